"""Load an artifact in several processes while another one takes its place again and again.

python -m tests.bench.readers [--every SECONDS] [--readers N] [--seconds N]

Prints a line of JSON: loads that succeeded, and those that failed by kind of error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import vlmbuild
from vlmbuild import QuantSpec, Recipe
from vlmbuild.artifact.staging import publish_exchange


def load(path: Path, until: float, results: multiprocessing.Queue[Counter[str]]) -> None:
    """Load until a time of the monotonic clock, and report how often it succeeded and what it raised."""
    found: Counter[str] = Counter()
    while time.monotonic() < until:
        try:
            vlmbuild.load(path)
            found["loaded"] += 1
        except Exception as error:  # every kind is reported
            found[type(error).__name__] += 1
    results.put(found)


def measure(folder: Path, every: float, readers: int, seconds: float) -> dict[str, object]:
    """Exchange two artifacts of a zoo checkpoint every so many seconds while they are loaded."""
    recipes = (Recipe(dtype="float32"), Recipe(dtype="float32", quantize=QuantSpec()))
    kept = [vlmbuild.build("qwen2-vl-digits", folder / str(place), recipe).path for place, recipe in enumerate(recipes)]
    path, staged = folder / "artifact", folder / "staged"
    shutil.copytree(kept[0], path)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    until = time.monotonic() + seconds + 15  # processes import for some of it
    processes = [context.Process(target=load, args=(path, until, results)) for _ in range(readers)]
    for process in processes:
        process.start()
    exchanges = 0
    while time.monotonic() < until:
        started = time.monotonic()
        shutil.copytree(kept[1 - exchanges % 2], staged)
        publish_exchange(staged, path)
        shutil.rmtree(staged)
        exchanges += 1
        time.sleep(max(0.0, every - (time.monotonic() - started)))
    total: Counter[str] = sum((results.get() for _ in processes), Counter())
    return {"every_s": every, "readers": readers, "exchanges": exchanges, **total}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(Path(name), arguments.every, arguments.readers, arguments.seconds)))
