"""Does an engine answer as the trained model did? Checkpoints x targets x formats x engines, on 50 held-out images.

    python -m tests.bench.engines --output artifacts/benchmarks/engines.json \\
        --python llama.cpp=~/llama/bin/python vllm=~/vllm/bin/python openvino=~/openvino/bin/python

Each row builds an artifact, runs the engine on 50 prompts in an interpreter of its own, and compares every stage with what the
artifact's program computes. `answers` counts greedy answers that are the program's, `trained` those that are the unquantized
checkpoint's. Images have sides of any length, or, in rows with "whole patches", sides that no processor resizes. The zoo's
checkpoints are trained; the others have random weights. An engine that is not installed makes a row that says so. transformers.js
needs Node and `NODE_PATH`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

import vlmbuild
from tests.bench.fresh import ROOT, machine, write_report
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import READ
from vlmbuild.engines import ENGINES
from vlmbuild.engines.ask import ask
from vlmbuild.engines.judge import judge
from vlmbuild.golden.cases import GoldenCase
from vlmbuild.golden.compare import first_difference
from vlmbuild.golden.record import GoldenRecord, record_artifact
from vlmbuild.zoo import ZOO

UNTRAINED: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {},
    "pixtral": {},
    "mistral3": {},
    "idefics3": {},
    "smolvlm": {},
    "gemma3": {"query_pre_attn_scalar": 64},  # as published: the size of a head
}
"""Family -> fields of the text_config of its random model."""
FORMATS = {
    "trainable": ("none", "nf4"),
    "onnx": ("none", "int4"),
    "gguf": ("none", "bf16", "q8_0", "q4_0"),
    "compressed-tensors": ("w4a16", "w8a8", "fp8"),
}
"""Target -> formats; `none` is float32, and float16 in GGUF files; `bf16` is bfloat16."""
WHOLE = "whole patches"
SIZES = ("any size", WHOLE)
IMAGES = 50


@dataclass(frozen=True)
class Built:
    """An artifact, and what its program computes."""

    path: Path
    manifest: Manifest
    records: list[GoldenRecord]


class Bench:
    """Checkpoints, artifacts and records, each made once.

    Args:
        folder: Where they are written.
        pythons: Engine -> its interpreter.
    """

    def __init__(self, folder: Path, pythons: dict[str, str]) -> None:
        self._folder, self._pythons = folder, pythons
        self.checkpoint, self.built, self._cases = cache(self._checkpoint), cache(self._built), cache(self._make_cases)

    def row(self, source: str, target: str, form: str, engine: str, sizes: str) -> dict[str, Any]:
        """Measure a row."""
        row: dict[str, Any] = {
            **{name: value for name, value in machine().items() if name in ("date", "machine")},
            "checkpoint": source,
            "target": target,
            "format": form,
            "engine": engine,
            "images": sizes,
        }
        try:
            built = self.built(source, target, form, sizes)
            trained = self.built(source, "trainable", "none", sizes)
            started = time.perf_counter()
            answers = ask(ENGINES[engine], built.path, built.records, python=self._pythons.get(engine))
            seconds = time.perf_counter() - started
            results, own_pixels = judge(built.path, built.manifest, ENGINES[engine], built.records, answers)
        except vlmbuild.VlmbuildError as error:
            return row | {"skipped": self._without_paths(str(error))[:400]}
        first = first_difference(results)
        said = [list(case.greedy or ()) for case in answers.cases]
        return row | {
            "version": answers.version,
            "answers": sum(map(list.__eq__, said, (record.greedy for record in built.records))),
            "trained": sum(map(list.__eq__, said, (record.greedy for record in trained.records))),
            "of": len(built.records),
            "first": None if first is None else first.document(),
            "own_pixels": len(own_pixels),
            "bytes": sum(entry.size for entry in built.manifest.files if not entry.path.startswith("golden/")),
            "seconds": round(seconds, 1),
        }

    def _without_paths(self, message: str) -> str:
        """Write a message as on any machine."""
        for path in (*self._pythons.values(), sys.executable):
            message = message.replace(path, "python")
        return " ".join(message.replace(f"{self._folder}/", "").split())

    def _checkpoint(self, source: str) -> Path:
        if source in ZOO:
            return ZOO[source]
        import checkpoints

        directory = self._folder / source
        directory.mkdir()
        return Path(checkpoints.write_untrained(source, directory, **UNTRAINED[source]))

    def _built(self, source: str, target: str, form: str, sizes: str) -> Built:
        path = self._folder / f"{source}-{target}-{form}"
        if not path.exists():
            dtype = {"gguf": "float16", "compressed-tensors": "bfloat16"}.get(target, "float32")
            recipe = vlmbuild.Recipe(target=target, dtype="bfloat16" if form == "bf16" else dtype)
            if form not in ("none", "bf16"):
                recipe = replace(recipe, quantize=vlmbuild.QuantSpec(form))
            vlmbuild.build(self.checkpoint(source), path, recipe)
        manifest = vlmbuild.verify(path)
        return Built(path, manifest, record_artifact(path, target, self._cases(source, sizes)))

    def _make_cases(self, source: str, sizes: str) -> list[GoldenCase]:
        _, processor = vlmbuild.load(self.built_path(source))
        content = [{"type": "image"}, {"type": "text", "text": READ.question}]
        images = [sample.image for sample in Digits("held_out", 11).take(IMAGES)]
        if sizes == WHOLE:
            images = [fitted(image, processor) for image in images]
        return [
            GoldenCase(f"image {number}", ({"role": "user", "content": content},), (image,))
            for number, image in enumerate(images)
        ]

    def built_path(self, source: str) -> Path:
        """Return the unquantized artifact, whose processor makes the prompts."""
        path = self._folder / f"{source}-trainable-none"
        if not path.exists():
            vlmbuild.build(self.checkpoint(source), path, vlmbuild.Recipe(dtype="float32"))
        return path


def fitted(image: Image.Image, processor: Any) -> Image.Image:
    """Give an image sides that no processor resizes: fill up to whole patches, or resize to a tile."""
    images = processor.image_processor
    patch = getattr(images, "patch_size", None)
    if patch is None:
        size = images.size
        side = int(size.get("longest_edge") or size["height"])
        return image.resize((side, side), Image.Resampling.BICUBIC)
    patch = patch if isinstance(patch, int) else patch["height"]
    side = int(patch) * int(getattr(images, "merge_size", None) or getattr(processor, "spatial_merge_size", 1))
    canvas = Image.new("RGB", tuple(-(-length // side) * side for length in image.size), "white")
    canvas.paste(image)
    return canvas


def line(row: dict[str, Any]) -> str:
    """Write a row for the terminal."""
    head = f"{row['checkpoint']:16} {row['target']:18} {row['format']:6} {row['engine']:15} {row['images']:13}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    first = "none" if row["first"] is None else f"{row['first']['stage']} {row['first']['error']}"
    counts = f"{row['answers']:3} {row['trained']:3} of {row['of']}"
    return f"{head} {counts}  first {first:18} {row['bytes'] / 1e6:6.2f} MB {row['seconds']:6.1f} s"


def rows(names: Sequence[str], engines: Sequence[str]) -> list[tuple[str, str, str, str, str]]:
    """List the rows; engines that resize as the processors do see images of any size alone."""
    return [
        (source, target, form, engine, sizes)
        for source in names
        for target, forms in FORMATS.items()
        for form in forms
        for engine in engines
        if target in ENGINES[engine].targets or (form == "none" and target in ENGINES[engine].unquantized)
        for sizes in (SIZES if target == "gguf" else SIZES[:1])
    ]


def overview(known: Sequence[dict[str, Any]]) -> str:
    """Write rows as a table in Markdown: checkpoints down, engines across, in each cell formats with their answers; a stage
    is named where it differs, and a row that could not run has a dash."""
    names = list(dict.fromkeys(row["checkpoint"] for row in known))
    columns = [(engine, sizes) for engine in ENGINES for sizes in (SIZES if engine == "llama.cpp" else SIZES[:1])]
    heads = [engine if engine != "llama.cpp" else f"{engine}, {sizes}" for engine, sizes in columns]
    lines = [["checkpoint", *heads], ["---"] * (len(heads) + 1)]
    for name in names:
        mine = sorted((row for row in known if row["checkpoint"] == name), key=form_order)
        cells = [[row for row in mine if key(row)[3:] == column] for column in columns]
        lines.append([name, *(", ".join(map(_cell, cell)) for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def form_order(row: dict[str, Any]) -> tuple[int, int]:
    """Return a row's place among those of an engine."""
    return list(FORMATS).index(row["target"]), FORMATS[row["target"]].index(row["format"])


def _cell(row: dict[str, Any]) -> str:
    form = row["target"] if row["format"] == "none" else row["format"]
    if "skipped" in row:
        return f"{form} -"
    return f"{form} {row['answers']}" + (f" ({row['first']['stage']})" if row["first"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", choices=[*ZOO, *UNTRAINED], default=[*ZOO, *UNTRAINED])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=[*ENGINES])
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PATH", help="interpreter of an engine")
    parser.add_argument("--output", type=Path, help="rows that it has of other engines and checkpoints are kept")
    parser.add_argument(
        "--table", action="store_true", help="write the rows of the output as Markdown, and measure nothing"
    )
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests/helpers")]
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    known = json.loads(arguments.output.read_text())["rows"] if arguments.output and arguments.output.exists() else []
    if arguments.table:
        print(overview(known))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), {name: str(Path(path).expanduser()) for name, path in pythons.items()})
        for cells in rows(arguments.checkpoints, arguments.engines):
            row = bench.row(*cells)
            print(line(row), flush=True)
            known = [other for other in known if key(other) != cells] + [row]
            write_report(arguments.output, machine() | {"rows": sorted(known, key=key)})


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what a row is about."""
    return tuple(row[name] for name in ("checkpoint", "target", "format", "engine", "images"))


if __name__ == "__main__":
    main()
