"""QLoRA training beside transformers with bitsandbytes and PEFT, on padded batches as visual instruction data has them.

    python -m tests.bench.training --output artifacts/benchmarks/training.json

Model: a random Qwen2-VL of width 512 with 28 decoder layers and 32 vision blocks, NF4 and bfloat16, LoRA of rank 16 on all
language layers, AdamW. All sides read one artifact and one adapter, and train on the same batches of `--samples` samples,
padded on the right; labels are on the answers.

a  step time and peak memory, with gradient checkpointing and without: vlmbuild, transformers with PEFT, and with Liger
b  time to the first step, loading included: vlmbuild, as it is and compiled by region, and the peer under torch.compile
c  losses of ten steps in float32, unquantized, beside PEFT's

Every measurement is a fresh process, the sides in turn, medians of `--rounds`; b once, with empty compiler caches. A step's time is compared batch by batch: the
first step of a process is left out of a.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import random_checkpoint
from tests.bench.fresh import bar, interleave, machine, medians, print_bars, run_fresh, warm_cache, write_report
from tests.bench.training_workers import lengths

WIDTH = 512
OURS, PEER = "vlmbuild", "transformers"
PATCHES_A_TOKEN = 4


def sources(work: Path) -> dict[str, Path]:
    """Make a random checkpoint, its artifacts, and the adapter that all sides start from."""
    import torch

    import vlmbuild

    values = json.loads((random_checkpoint.CONFIG / "config.json").read_text())
    values |= {"hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 2944}
    values["vision_config"] |= {"embed_dim": WIDTH, "num_heads": 8, "hidden_size": WIDTH}
    random_checkpoint.write_checkpoint(work / "checkpoint", values, random_checkpoint.CONFIG, seed=0, rank=64)
    recipes = {
        "nf4": vlmbuild.Recipe(quantize=vlmbuild.QuantSpec()),
        "float32": vlmbuild.Recipe(dtype="float32"),
    }
    made = {name: work / name for name in recipes}
    for name, recipe in recipes.items():
        vlmbuild.build(work / "checkpoint", made[name], recipe)
    model, _ = vlmbuild.load(made["nf4"])
    torch.manual_seed(0)
    vlmbuild.add_lora(model, r=16)
    vlmbuild.save_adapter(model, work / "adapter")
    return made | {"adapter": work / "adapter"}


class Bench:
    """Where things are, and how they are measured."""

    def __init__(self, paths: dict[str, Path], arguments: argparse.Namespace) -> None:
        self.paths, self.arguments = paths, arguments

    def run(self, side: str, artifact: str = "nf4", **options: Any) -> dict[str, Any]:
        chosen = {
            "artifact": self.paths[artifact],
            "adapter": self.paths["adapter"],
            "checkpointing": False,
            "compile": False,
            "dtype": "bfloat16",
            "liger": False,
            "limit": 400,
            "samples": self.arguments.samples,
            "seed": 1,
            "steps": self.arguments.steps,
        }
        return run_fresh("tests.bench.training_workers", side, self.arguments.threads, **{**chosen, **options})

    def turns(self, cases: dict[str, dict[str, Any]], rounds: int) -> dict[str, dict[str, Any]]:
        """Medians of every case."""
        calls = {name: partial(self.run, **options) for name, options in cases.items()}
        return {name: merged(results) for name, results in interleave(calls, rounds, _brief).items()}

    def steps(self) -> dict[str, Any]:
        cases: dict[str, dict[str, Any]] = {}
        for checkpointing in (False, True):
            suffix = ", checkpointing" if checkpointing else ""
            cases[OURS + suffix] = {"side": OURS, "checkpointing": checkpointing}
            cases[PEER + suffix] = {"side": PEER, "checkpointing": checkpointing}
        cases["transformers with Liger"] = {"side": PEER, "liger": True}
        return self.turns(cases, self.arguments.rounds)

    def first_step(self) -> dict[str, Any]:
        return self.turns(
            {
                OURS: {"side": OURS, "steps": 1},
                "vlmbuild, compiled": {"side": OURS, "steps": 1, "compile": True},
                "transformers, torch.compile": {"side": PEER, "steps": 1, "compile": True},
            },
            rounds=1,
        )

    def losses(self) -> dict[str, Any]:
        options = {"artifact": "float32", "dtype": "float32", "steps": 10, "samples": 2}
        found = {side: self.run(side, **options)["losses"] for side in (OURS, PEER)}
        errors = [abs(a - b) / abs(b) for a, b in zip(found[OURS], found[PEER], strict=True)]
        return found | {"largest_relative_difference": max(errors)}


def _brief(case: str, row: dict[str, Any]) -> str:
    return f"{case:34} {row.get('absent') or [round(seconds, 1) for seconds in row['seconds']]}"


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds; of step times batch by batch."""
    names = ("first_step", "peak_resident", "peak_anonymous", "imports_resident", "process_seconds")
    figures = medians(results, names)
    if "absent" in figures:
        return figures
    steps = zip(*(result["seconds"] for result in results), strict=True)
    kept = {name: results[0][name] for name in ("losses", "compilations")}
    return figures | {"seconds": [median(step) for step in steps]} | kept


def data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Describe the batches: tokens with padding and without, labels, and the share of padding."""
    drawn = lengths(1, arguments.steps * arguments.samples)
    sizes = [p + a + sum(h * w // PATCHES_A_TOKEN + 2 for h, w in grids) for p, a, grids in drawn]
    rows = [sizes[n : n + arguments.samples] for n in range(0, len(sizes), arguments.samples)]
    padded = sum(max(row) * len(row) for row in rows)
    return {
        "samples": len(sizes),
        "tokens": sum(sizes),
        "padded_tokens": padded,
        "labels": sum(a for _, a, _ in drawn),
        "padding_share": round(1 - sum(sizes) / padded, 3),
    }


def ratios(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the figures with the goals."""
    found = []
    for suffix in ("", ", checkpointing"):
        ours, theirs = (report["a"][side + suffix] for side in (OURS, PEER))
        speed = median(b / a for a, b in zip(ours["seconds"][1:], theirs["seconds"][1:], strict=True))
        found.append(bar(f"step time{suffix or ', all activations kept'}: peer / ours", ">= 1.5", speed))
        memory = ours["peak_resident"] / theirs["peak_resident"]
        found.append(bar(f"peak resident memory{suffix}: ours / peer", "<= 0.6", memory))
        above = [one["peak_resident"] - one["imports_resident"] for one in (ours, theirs)]
        found.append(bar(f"the same above the imports{suffix}", "<= 0.6", above[0] / above[1]))
    compiled = report["b"]["transformers, torch.compile"]
    if "absent" not in compiled:
        for name in (OURS, "vlmbuild, compiled"):
            sooner = compiled["first_step"] / report["b"][name]["first_step"]
            found.append(bar(f"time to the first step, {name}: peer compiled / ours", ">= 5", sooner))
    error = report["c"]["largest_relative_difference"]
    found.append(bar("losses of ten float32 steps: relative difference", "<= 1e-4", error))
    return found


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['machine']}, {report['threads']} threads, {report['date']}; data: {report['data']}")
    for part in "ab":
        print(f"\n{part:34} {'first step':>10} {'other steps':>11} {'peak':>9} {'graphs':>7}")
        for name, found in report[part].items():
            if "absent" in found:
                print(f"  {name:32} does not run: {found['absent']}")
                continue
            later = sum(found["seconds"][1:]) / max(1, len(found["seconds"]) - 1)
            peak = found["peak_resident"] / 1e9
            print(f"  {name:32} {found['first_step']:8.1f} s {later:9.2f} s {peak:6.2f} GB {found['compilations']:7}")
    print_bars(report["bars"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4, help="of a batch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        paths = sources(Path(work))
        for path in paths.values():
            warm_cache(path)
        bench = Bench(paths, arguments)
        report = machine() | {"rounds": arguments.rounds, "threads": arguments.threads, "data": data(arguments)}
        report |= {"a": bench.steps(), "b": bench.first_step(), "c": bench.losses()}
    report["bars"] = ratios(report)
    show(report)
    write_report(arguments.output, report)


if __name__ == "__main__":
    main()
