"""Compare an engine with an artifact's golden cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.engines import ENGINES
from vlmbuild.engines.ask import ask
from vlmbuild.engines.judge import judge
from vlmbuild.errors import UsageError
from vlmbuild.golden.cases import GoldenCase
from vlmbuild.golden.compare import first_difference, worst_by_stage
from vlmbuild.golden.files import CASES, read_golden
from vlmbuild.golden.record import GoldenRecord, record_artifact
from vlmbuild.util.progress import Progress, silent
from vlmbuild.util.validation import one_of


def verify_engine(
    directory: Path,
    manifest: Manifest,
    name: str,
    *,
    python: str | None = None,
    model: Path | None = None,
    cases: Sequence[GoldenCase] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run an engine on an artifact's golden cases, which are recorded now where the artifact has none, and compare.

    Args:
        directory: The artifact; its files are those of the manifest.
        manifest: Its manifest.
        name: Name of the engine, a key of `ENGINES`.
        python: Interpreter of the engine; None is this one.
        model: Folder that the engine opens; None is the artifact.
        cases: Prompts in place of the artifact's.
        progress: Called with a stage's name, the amount done, and the total.

    Returns:
        Plain values: `name`, `version`, `model`, `left_out` (cases with more images than it takes), `own_pixels` (cases that
        are compared with what the program makes of the engine's pixels), `results` in the order of the stages, the worst of
        each in `stages`, `first`, the first that differs, and `known`, why the engine is known to.

    Raises:
        UsageError: The engine does not open artifacts of this target.
        IncompatibleError: The engine is not installed, or cannot run.
    """
    one_of("--engine", name, tuple(ENGINES))
    engine = ENGINES[name]
    if model is None and not engine.opens(manifest):
        raise UsageError(
            f"{name} does not open {manifest.name}, of the target {manifest.target}. {_others(manifest)}, or pass the folder "
            "that it serves with --engine-model DIR."
        )
    records = recorded(directory, manifest, cases, progress)
    one = engine.one_image and ((model or directory) / "onnx").is_dir()
    left_out = [record.case.name for record in records if one and len(record.case.images) > 1]
    records = [record for record in records if record.case.name not in left_out]
    progress(name, 0, 1)
    answers = ask(engine, model or directory, records, python=python)
    progress(name, 1, 1)
    results, own_pixels = judge(directory, manifest, engine, records, answers, progress)
    first = first_difference(results)
    return {
        "name": name,
        "version": answers.version,
        "model": str(model or directory),
        "cases": len(records),
        "left_out": left_out,
        "own_pixels": own_pixels,
        "stages": [result.document() for result in worst_by_stage(results)],
        "results": [result.document() for result in results],
        "first": None if first is None else first.document(),
        "known": "" if first is None else answers.known.get(first.stage, ""),
    }


def recorded(
    directory: Path, manifest: Manifest, cases: Sequence[GoldenCase] = (), progress: Progress = silent
) -> list[GoldenRecord]:
    """Return the golden cases of an artifact, or record some now."""
    if not cases and manifest.entry(CASES) is not None:
        return read_golden(lambda path: (directory / path).read_bytes())
    return record_artifact(directory, manifest.target, cases, progress=progress)


def _others(manifest: Manifest) -> str:
    names = [name for name, engine in ENGINES.items() if engine.opens(manifest)]
    return f"Choose --engine {' or '.join(names)}" if names else "No engine does: export it with --target onnx"
