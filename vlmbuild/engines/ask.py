"""Run an engine in an interpreter of its own: a job as JSON, values in a folder.

The worker is called with the path of job.json, which holds

    model    folder that the engine opens
    out      folder for values
    cases    name, messages (images as {"type": "image", "path": FILE}), images (files), text (the prompt), template (whether
             the chat template wrote it), tokens (the prompt's, for engines whose callers process prompts themselves),
             modules (stage -> module of transformers' names, and "input" or "output")
    steps    tokens to generate
    last     positions at the end of the prompt whose logits are wanted

and writes out/result.json: `version` of the engine, `dtype` in which it computes if that is not the artifact's, and, for each
case, what it can show of `tokens`, `greedy`, `log_probabilities` (token -> value, at the end of the prompt), `values` (stage
-> shape; the values are little-endian float32 in out/NUMBER.STAGE.f32), and `failed` (stage, message). A worker that lacks a
package prints its name on stderr and ends with `MISSING`. `known` says how the engine is known to differ at a stage.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.errors import IncompatibleError, UsageError
from vlmbuild.golden import tolerances
from vlmbuild.golden.cases import png
from vlmbuild.golden.compare import Answer, Limits
from vlmbuild.golden.record import STEPS, GoldenRecord
from vlmbuild.golden.sample import LAST

MISSING = 86
"""Exit code of a worker that lacks a package."""
_WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine.

    Attributes:
        name: Name of the engine.
        worker: File in `workers/`.
        install: The line that installs it; {python} is the interpreter.
        targets: Targets whose artifacts it opens.
        unquantized: Targets whose artifacts it opens if nothing in them is quantized.
        pixels: Tolerance of its processor's pixels.
        program: Program that runs the worker; None is Python.
        one_image: Whether it takes one image a prompt of ONNX models.
        environment: Environment variables besides the caller's.
    """

    name: str
    worker: str
    install: str
    targets: tuple[str, ...]
    pixels: float = tolerances.PIXELS
    program: str | None = None
    one_image: bool = False
    unquantized: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def opens(self, manifest: Manifest) -> bool:
        """Tell whether it opens an artifact with this manifest."""
        quantized = (manifest.recipe.get("quantize") or {}).get("format") not in (None, "none")
        return manifest.target in self.targets or (manifest.target in self.unquantized and not quantized)

    def limits(self, dtype: str, *, vision: float = 0.0, language: float = 0.0) -> Limits:
        """Return the tolerances where it computes in this dtype, and rounds inputs of the tower's and of the language model's
        products with these relative errors."""
        compute = tolerances.COMPUTE[dtype]
        tower, text = (max(compute, tolerances.ROUNDED * error) for error in (vision, max(vision, language)))
        return Limits(tower, text, self.pixels)


@dataclass(frozen=True, slots=True)
class Answers:
    """Results of an engine.

    Attributes:
        version: Its version.
        cases: Its results on each case.
        dtype: Dtype in which it computes; None is the artifact's.
        known: Known reasons for a difference, by stage.
    """

    version: str
    cases: list[Answer]
    dtype: str | None = None
    known: Mapping[str, str] = field(default_factory=dict)


def ask(engine: Engine, model: Path, records: Sequence[GoldenRecord], *, python: str | None = None) -> Answers:
    """Run an engine on golden cases.

    Args:
        engine: The engine.
        model: Folder that it opens.
        records: The cases.
        python: Its interpreter; None is this one, or the program that the engine names.

    Raises:
        UsageError: There is no such interpreter.
        IncompatibleError: The engine is not installed there, or ends without an answer.
    """
    program = python or engine.program or sys.executable
    if shutil.which(program) is None:
        found = "cannot be executed" if Path(program).exists() else "was not found"
        raise UsageError(f"{program} {found}. Pass the interpreter of {engine.name} with --engine-python PATH.")
    with tempfile.TemporaryDirectory(prefix="vlmbuild-engine-") as folder:
        job = _write_job(Path(folder), model, records)
        environment = {**_plain_environment(), **dict(engine.environment)}
        code, said = run_worker([program, str(_WORKERS / engine.worker), str(job)], environment)
        if code == MISSING:
            raise IncompatibleError(
                f"{engine.name} cannot run in {program}: {said}. Install it with "
                f"`{engine.install.format(python=program)}`, or pass another interpreter with --engine-python PATH."
            )
        result = job.parent / "result.json"
        if not code and not result.is_file():
            raise IncompatibleError(
                f"{program} has run, and written no result. Pass the interpreter of {engine.name} with --engine-python PATH."
            )
        if code:
            raise IncompatibleError(
                f"{engine.name} ended with {code} on {model}: {said}. Run it on the folder by itself."
            )
        return _answers(json.loads(result.read_text(encoding="utf-8")), result.parent)


def run_worker(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a worker; returns its exit code, and the last line that it has written to stderr."""
    done = subprocess.run(  # noqa: S603  (the user's own interpreter)
        list(command), capture_output=True, text=True, errors="replace", env=dict(environment), check=False
    )
    return done.returncode, _last(done.stderr)


def _write_job(folder: Path, model: Path, records: Sequence[GoldenRecord]) -> Path:
    cases = []
    for number, record in enumerate(records):
        images = [folder / f"{number}-{index}.png" for index in range(len(record.case.images))]
        for file, image in zip(images, record.case.images, strict=True):
            file.write_bytes(png(image))
        cases.append(
            {
                "name": record.case.name,
                "messages": _with_paths(record.case.messages, images),
                "images": [str(file) for file in images],
                "text": record.text,
                "template": record.template,
                "tokens": record.tokens,
                "modules": record.modules,
            }
        )
    job = folder / "job.json"
    document = {"model": str(model.absolute()), "out": str(folder), "cases": cases, "steps": STEPS, "last": LAST}
    job.write_text(json.dumps(document), encoding="utf-8")
    return job


def _with_paths(messages: Sequence[Mapping[str, Any]], images: Sequence[Path]) -> list[dict[str, Any]]:
    """Name the files of images in messages."""
    files = iter(images)
    said = []
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
        named = [{**part, "path": str(next(files))} if part["type"] == "image" else part for part in parts]
        said.append({**message, "content": named})
    return said


def _answers(document: Mapping[str, Any], folder: Path) -> Answers:
    cases = []
    for number, case in enumerate(document["cases"]):
        values = {
            stage: np.fromfile(folder / f"{number}.{stage}.f32", "<f4").reshape(shape)
            for stage, shape in case.get("values", {}).items()
        }
        cases.append(
            Answer(
                case.get("tokens"),
                values,
                case.get("greedy"),
                {int(token): value for token, value in case.get("log_probabilities", {}).items()},
                tuple(case["failed"]) if "failed" in case else None,
            )
        )
    return Answers(str(document.get("version", "")), cases, document.get("dtype"), document.get("known", {}))


def _plain_environment() -> dict[str, str]:
    """Return the environment without what only this interpreter's packages need, and offline: models are folders."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "Error: " in line] or lines  # Node writes its version after an error
    return said[-1][:400].rstrip(".") if said else "it says nothing"
