"""Exported models beside transformers, its exporters and OpenVINO, on a random Qwen2-VL of width 1024 with 12 decoder layers;
compilation also on one of half the width with as many layers as Qwen2-VL has.

    python -m tests.bench.export --output artifacts/benchmarks/export.json [--openvino PYTHON] [--optimum PYTHON]

The two options name interpreters with OpenVINO, and with optimum-intel and the transformers that it takes; without them these
sides are absent. All sides have the same float32 or rounded weights and say what they take:

export  time, peak memory and size of what is written; loading the checkpoint included
image   latency of the vision tower on 448 x 448 pixels, 1,024 patches
prompt  tokens of text a second until the logits of the last one
token   tokens a second after that prompt, one at a time, chosen greedily

Exports are fresh processes with all cores. Every other measurement is a fresh process on one core, another one in each round, the
sides in turn; medians. The memory's bandwidth is
measured in the same processes: what one core reads, and reads and writes in a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import random_checkpoint
from tests.bench.export_workers import SIDES
from tests.bench.fresh import bar, interleave, machine, medians, print_bars, run_fresh, warm_cache, write_report

VOCABULARY = 8192
SIZE, DEEP = (1024, 12, 4), (512, 28, 32)
"""Width, decoder layers and vision layers of the model that is run, and of one as deep as published ones."""
OURS, INT4, LARGE_BLOCKS = "vlmbuild, ONNX", "vlmbuild, ONNX, int4", "vlmbuild, ONNX, int4, blocks of 256"
COMPILED, EXPORTER, INDUCTOR = (
    "vlmbuild, AOTInductor",
    "transformers.exporters, ONNX",
    "transformers.exporters, AOTInductor",
)
BANDWIDTH_SHARE, EXPORT_TIME, COMPILE_TIME = 0.7, 2.0, 3.0
SAME_FILES = {"transformers.exporters, OpenVINO, bfloat16": "transformers.exporters, OpenVINO"}
"""Sides that run what another one has written."""


def checkpoint(directory: Path, width: int, layers: int, vision_layers: int) -> Path:
    """Random weights with the zoo's tokenizer."""
    values = json.loads((random_checkpoint.CONFIG / "config.json").read_text())
    heads = width // 128
    values |= {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "vocab_size": VOCABULARY,
        "image_token_id": 318,
        "video_token_id": 319,
        "vision_start_token_id": 315,
        "vision_end_token_id": 316,
        "bos_token_id": 307,
        "eos_token_id": 306,
    }
    values["vision_config"] |= {
        "embed_dim": width,
        "num_heads": width // 64,
        "hidden_size": width,
        "depth": vision_layers,
    }
    random_checkpoint.write_checkpoint(directory, values, random_checkpoint.CONFIG, seed=0, rank=64)
    return directory


class Bench:
    """Where things are, and how they are measured."""

    def __init__(self, work: Path, source: Path, arguments: argparse.Namespace) -> None:
        self.work, self.source, self.arguments = work, source, arguments
        self.cores = sorted(os.sched_getaffinity(0))

    def stage(self, stage: str, side: str, turn: int) -> dict[str, Any]:
        """Run one stage in a fresh process."""
        options = {
            "side": side,
            "checkpoint": self.source,
            "output": self.output(side),
            "tokens": self.arguments.tokens,
            "steps": self.arguments.steps,
            "core": self.cores[turn % len(self.cores)] if stage == "run" else None,
        }
        result = run_fresh("tests.bench.export_workers", stage, 1, python=self._python(side), **options)
        if stage == "export":
            print(_brief(side, result), flush=True)
        return result

    def export(self) -> dict[str, Any]:
        """Export every side once."""
        return {side: self.stage("export", side, 0) for side in self.arguments.sides if side not in SAME_FILES}

    def export_deep(self) -> dict[str, Any]:
        """Export the compiling sides once, from a narrow model that is as deep as published ones."""
        work = self.work / "deep"
        bench = Bench(work, checkpoint(work / "checkpoint", *DEEP), self.arguments)
        return {side: bench.stage("export", side, 0) for side in (COMPILED, INDUCTOR) if side in self.arguments.sides}

    def run(self, exported: dict[str, Any]) -> dict[str, Any]:
        """Run every side in turn, another core in each round; medians."""
        turns = dict.fromkeys(self.arguments.sides, 0)

        def once(side: str) -> dict[str, Any]:
            source = SAME_FILES.get(side, side)
            if "absent" in exported[source]:
                return dict(exported[source])
            warm_cache(self.output(side))
            turns[side] += 1
            return self.stage("run", side, turns[side] - 1)

        cases = {side: partial(once, side) for side in turns}
        return {side: merged(results) for side, results in interleave(cases, self.arguments.rounds, _brief).items()}

    def output(self, side: str) -> Path:
        """Directory of what a side runs from."""
        return self.work / SAME_FILES.get(side, side).replace(" ", "-").replace(",", "")

    def _python(self, side: str) -> str:
        given = self.arguments
        chosen = given.optimum if side.startswith("optimum") else given.openvino if "OpenVINO" in side else None
        return chosen or sys.executable


def _brief(side: str, row: dict[str, Any]) -> str:
    shown = {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
    return f"{side:44} {row.get('absent') or shown}"


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds; a side's best bandwidth."""
    figures = medians(results, ("load", "image", "prompt", "token", "peak_resident"))
    if "absent" in figures:
        return figures
    kept = {name: results[0][name] for name in ("image_absent", "bytes_per_token", "said") if name in results[0]}
    widths = {kind: max(result["bandwidth"][kind] for result in results) for kind in ("read", "copy")}
    return figures | kept | {"bandwidth": widths, "rounds": len(results)}


def speeds(report: dict[str, Any], tokens: int) -> dict[str, dict[str, Any]]:
    """Tokens a second, and the share of the bandwidth that a token's weights take."""
    found = {}
    widest = max(result["bandwidth"]["read"] for result in report["run"].values() if "bandwidth" in result)
    said = report["run"].get("transformers", {}).get("said", [])
    for side, result in report["run"].items():
        if "absent" in result:
            continue
        rate = result["bytes_per_token"] / result["token"]
        same = next((n for n, (a, b) in enumerate(zip(result["said"], said, strict=False)) if a != b), len(said))
        found[side] = {
            "prompt_tokens_per_second": round(tokens / result["prompt"], 1),
            "tokens_per_second": round(1 / result["token"], 1),
            "bytes_per_second": round(rate),
            "share_of_bandwidth": round(rate / widest, 3) if rate else None,
            "first_tokens_as_transformers": same,
        }
    return found


def bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bars: the goal and the measurement of each."""
    found = []
    for side in (OURS, COMPILED, INT4, LARGE_BLOCKS):
        for name, label in (("tokens_per_second", "tokens after a prompt"), ("prompt_tokens_per_second", "prompt")):
            peers = {peer: x[name] for peer, x in report["speeds"].items() if _comparable(peer, side)}
            if side in report["speeds"] and peers:
                best = max(peers, key=lambda peer: peers[peer])
                ratio = report["speeds"][side][name] / peers[best]
                found.append(bar(f"{label}, {side} / {best}", ">= 1", ratio))
        if side in (INT4, LARGE_BLOCKS) and side in report["speeds"]:
            share = report["speeds"][side]["share_of_bandwidth"]
            found.append(bar(f"share of the bandwidth, {side}", f">= {BANDWIDTH_SHARE}", share))
    if "seconds" in report["export"].get(EXPORTER, {}) and OURS in report["export"]:
        ratio = report["export"][OURS]["seconds"] / report["export"][EXPORTER]["seconds"]
        found.append(bar(f"export time, {OURS} / {EXPORTER}", f"<= {EXPORT_TIME:g}", ratio))
    for place, (_, layers, vision_layers) in (("export", SIZE), ("export_deep", DEEP)):
        sides = [report[place].get(side, {}) for side in (INDUCTOR, COMPILED)]
        if all("seconds" in side for side in sides):
            ratio = sides[0]["seconds"] / sides[1]["seconds"]
            name = f"export time of {vision_layers} + {layers} layers, {INDUCTOR} / {COMPILED}"
            found.append(bar(name, f">= {COMPILE_TIME:g}", ratio))
    return found


def _comparable(peer: str, side: str) -> bool:
    """Return whether a peer's weights have as many bits as a side's."""
    kinds = [next((kind for kind in ("int4", "bfloat16") if kind in name), "float32") for name in (peer, side)]
    return not peer.startswith("vlmbuild") and kinds[0] == kinds[1]


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['machine']}, one core, {report['date']}")
    print(f"{'':44} {'export':>8} {'peak':>8} {'size':>8} {'image':>8} {'prompt':>10} {'tokens':>9} {'bandwidth':>10}")
    for side, result in report["run"].items():
        if "absent" in result:
            print(f"{side:44} absent: {result['absent'][:100]}")
            continue
        written, speed = report["export"][SAME_FILES.get(side, side)], report["speeds"][side]
        image = f"{result['image'] * 1e3:5.0f} ms" if "image" in result else "-"
        print(
            f"{side:44} {written['seconds']:6.1f} s {written['peak_resident'] / 1e9:5.2f} GB {written['bytes'] / 1e6:5.0f} MB "
            f"{image:>8} {speed['prompt_tokens_per_second']:8.0f}/s {speed['tokens_per_second']:7.1f}/s "
            f"{'-' if speed['share_of_bandwidth'] is None else format(speed['share_of_bandwidth'], '.0%'):>9}"
        )
    print_bars(report["bars"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--openvino", metavar="PYTHON", help="interpreter with OpenVINO")
    parser.add_argument("--optimum", metavar="PYTHON", help="interpreter with optimum-intel")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES), metavar="SIDE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=320, help="of the prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens after it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), checkpoint(Path(work) / "checkpoint", *SIZE), arguments)
        report = machine() | {"threads": 1, "tokens": arguments.tokens, "steps": arguments.steps}
        report["export"] = bench.export()
        report["export_deep"] = bench.export_deep()
        report["run"] = bench.run(report["export"])
    report["speeds"] = speeds(report, arguments.tokens)
    report["bars"] = bars(report)
    show(report)
    write_report(arguments.output, report)


if __name__ == "__main__":
    main()
