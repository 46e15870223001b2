"""The measurements of `export.py`, each in a process of its own: `python -m tests.bench.export_workers STAGE OPTIONS`.

STAGE is export (write what a side runs from) or run (time it). The last line is JSON; a side that cannot run here makes it
{"absent": reason}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.bench.export_peers import InductorPeer, OnnxPeer, OpenVinoPeer, OptimumPeer
from tests.bench.export_sides import Eager, Ours, Side
from tests.bench.fresh import PeakMemory, timed

IMAGE, START, END, WORDS = 318, 315, 316, 300
"""Token ids from the zoo's vocabulary, which the checkpoint shares."""
GRID = (1, 32, 32)
BUFFER = 50_000_000
"""Numbers that are read to measure the memory's bandwidth: 200 MB, six times the cache."""

SIDES: dict[str, Callable[[dict[str, Any]], Side]] = {
    "vlmbuild, ONNX": Ours,
    "vlmbuild, ONNX, int4": lambda options: Ours(options, quantize="int4"),
    "vlmbuild, ONNX, int4, blocks of 256": lambda options: Ours(options, quantize="int4", blocksize=256),
    "vlmbuild, ONNX, int4, exact inputs": lambda options: Ours(options, quantize="int4", exact_inputs=True),
    "vlmbuild, AOTInductor": lambda options: Ours(options, target="aoti"),
    "transformers": Eager,
    "transformers.exporters, ONNX": OnnxPeer,
    "transformers.exporters, ONNX, int4": lambda options: OnnxPeer(options, int4=True),
    "transformers.exporters, AOTInductor": InductorPeer,
    "transformers.exporters, OpenVINO": OpenVinoPeer,
    "transformers.exporters, OpenVINO, bfloat16": lambda options: OpenVinoPeer(options, "bf16"),
    "optimum-intel": OptimumPeer,
    "optimum-intel, int4": lambda options: OptimumPeer(options, int4=True),
}


def prompt(tokens: int) -> torch.Tensor:
    """Token ids (1, tokens)."""
    return torch.randint(0, WORDS, (1, tokens), generator=torch.Generator().manual_seed(0))


def image_batch() -> dict[str, torch.Tensor]:
    """Make one image of 448 x 448 pixels, as the processor does, and the prompt that shows it."""
    patches = GRID[1] * GRID[2]
    ids = torch.cat([torch.tensor([[START] + [IMAGE] * (patches // 4) + [END]]), prompt(16)], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": torch.tensor([GRID]),
        "pixel_values": torch.randn(patches, 1176, generator=torch.Generator().manual_seed(0)),
    }


def bandwidth() -> dict[str, float]:
    """Measure bytes per second of one core: read in one pass, and read plus written in a copy; the best of some."""
    numbers = torch.ones(BUFFER)
    other = torch.empty_like(numbers)
    halves = numbers.chunk(2)
    read = timed(lambda: torch.dot(*halves), least=5, seconds=0.1)
    copied = timed(lambda: other.copy_(numbers), least=5, seconds=0.1)
    return {"read": numbers.nbytes / min(read), "copy": 2 * numbers.nbytes / min(copied)}


def export(options: dict[str, Any]) -> dict[str, Any]:
    """Write an artifact; what it takes."""
    output = Path(options["output"])
    with PeakMemory() as memory:
        started = time.perf_counter()
        SIDES[options["side"]](options).export(Path(options["checkpoint"]), output)
        seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file() and not file.is_symlink())
    return {"seconds": seconds, "bytes": size, **memory.figures()}


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Latency of an image, of a prompt and of a token after it."""
    side = SIDES[options["side"]](options)
    with PeakMemory() as memory:
        started = time.perf_counter()
        side.open(Path(options["output"]))
        loaded = time.perf_counter() - started
        found: dict[str, Any] = {"load": loaded, "bytes_per_token": side.bytes_per_token()}
        try:
            batch = image_batch()
            found["image"] = median(timed(lambda: side.encode(batch), least=5, seconds=2))
        except NotImplementedError as error:
            found["image_absent"] = str(error)
        ids = prompt(options["tokens"])
        found["prompt"] = median(timed(lambda: side.prompt(ids), least=3, seconds=3))
        found["token"], found["said"] = decode(side, ids, options["steps"])
    return found | memory.figures() | {"bandwidth": bandwidth()}


def decode(side: Any, ids: torch.Tensor, steps: int) -> tuple[float, list[int]]:
    """Median seconds of a step, and the greedy tokens."""
    seconds: list[float] = []
    gc.collect()
    for _ in range(2):
        said = [int(side.prompt(ids).argmax())]
        for _ in range(steps):
            started = time.perf_counter()
            logits = side.step(said[-1])
            said.append(int(logits.argmax()))
            seconds.append(time.perf_counter() - started)
    return median(seconds), said


def main(stage: str, text: str) -> None:
    options = json.loads(text)
    if options.get("core") is not None:
        os.sched_setaffinity(0, {options["core"]})
        torch.set_num_threads(1)
    with torch.no_grad():
        try:
            result = {"export": export, "run": run}[stage](options)
        except ModuleNotFoundError as error:
            result = {"absent": f"{error.name} is not installed"}
        except Exception as error:  # whatever a peer raises is the result
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
            result = {"absent": " ".join(f"{reason}{cause}".split())[:500]}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
