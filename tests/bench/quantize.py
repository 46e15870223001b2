"""4-bit build, load, speed and size beside transformers with bitsandbytes, on a random Qwen2-VL of published size.

    python -m tests.bench.quantize --output artifacts/benchmarks/quantize.json

a  build: read, quantize, write; bit equality of both outputs; peak memory, also of a checkpoint twice as deep
b  load of the artifact unverified and verified, of the peer's quantized checkpoint and of the artifact by the peer
c  forward, and forward and backward with LoRA of rank 16, on 256 tokens: NF4 and bfloat16
d  one token a forward pass without a cache, as a share of memory bandwidth, and the peer's cached generation
e  bytes on disk against bytes of tensors

Every measurement is a fresh process, the sides in turn, medians of `--rounds`; files are read once before, so that the page
cache holds them for both sides. In c and d both read the same 4-bit weights, those of our artifact.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.fresh import interleave, machine, medians, run_fresh, warm_cache, write_report
from tests.bench.quantize_report import bars, show
from tests.bench.quantize_workers import TRANSFORMERS, VLMBUILD

SIDES = {
    "vlmbuild nf4": (VLMBUILD, True),
    "transformers nf4": (TRANSFORMERS, True),
    "vlmbuild bf16": (VLMBUILD, False),
    "transformers bf16": (TRANSFORMERS, False),
}
PARTS = "abcde"


@dataclass(frozen=True)
class Bench:
    """Where things are, and how often they are measured."""

    work: Path
    checkpoint: Path
    deep: Path
    rounds: int
    threads: int

    def worker(self, name: str, **options: Any) -> dict[str, Any]:
        return run_fresh("tests.bench.quantize_workers", name, self.threads, **options)

    def build(self, name: str, checkpoint: Path, **options: Any) -> dict[str, Any]:
        """Build into the work directory, in place of the last build of that name."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        if options.get("side") == TRANSFORMERS:
            options["skip"] = skipped_modules(self.artifact("nf4"))
        warm_cache(checkpoint)
        return self.worker("build", checkpoint=checkpoint, output=self.work / name, **options)

    def artifact(self, name: str) -> Path:
        """Return the artifact nf4, bf16 or peer, built when it is not there."""
        path = self.work / name
        if not path.exists():
            self.build(
                name, self.checkpoint, side=TRANSFORMERS if name == "peer" else VLMBUILD, quantized=name != "bf16"
            )
        return path

    def interleaved(self, cases: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
        """Medians of times and greatest memory of every case."""
        return {case: summary(results) for case, results in interleave(cases, self.rounds, brief).items()}


def skipped_modules(artifact: Path) -> list[str]:
    modules: list[str] = json.loads((artifact / "config.json").read_text())["quantization_config"][
        "llm_int8_skip_modules"
    ]
    return modules


def brief(case: str, result: Mapping[str, Any]) -> str:
    if "absent" in result:
        return f"{case:28} absent: {result['absent']}"
    peaks = ", ".join(f"{name} {result[f'peak_{name}'] / 1e6:.0f} MB" for name in ("resident", "anonymous"))
    return f"{case:28} {time_of(result):9.3f} s  process {result['process_seconds']:6.1f} s  {peaks}"


def time_of(result: Mapping[str, Any]) -> float:
    return float(result["seconds"] if "seconds" in result else median(result["runs"]))


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize several runs in one record."""
    record = medians(results, ("process_seconds", "generate"))
    if "absent" in record:
        return {"absent": record["absent"]}
    record |= {key: max(result[key] for result in results) for key in ("peak_resident", "peak_anonymous")}
    record["runs"] = [time_of(result) for result in results]
    record["seconds"] = median(record["runs"])
    if "stages" in results[0]:
        stages = [result["stages"] for result in results]
        record["stages"] = {key: median(stage.get(key, 0.0) for stage in stages) for key in stages[0]}
    return record | {key: results[0][key] for key in ("logits", "loss", "trainable") if key in results[0]}


def part_a(bench: Bench) -> dict[str, Any]:
    figures = bench.interleaved(
        {
            "vlmbuild": lambda: bench.build("nf4", bench.checkpoint, side=VLMBUILD),
            "transformers": lambda: bench.build("peer", bench.checkpoint, side=TRANSFORMERS),
            "vlmbuild, twice as deep": lambda: bench.build("deep", bench.deep, side=VLMBUILD),
        },
    )
    shutil.rmtree(bench.work / "deep")
    if "absent" not in figures["transformers"]:
        figures["equality"] = bench.worker("compare", ours=bench.artifact("nf4"), theirs=bench.artifact("peer"))
    return figures


def part_b(bench: Bench) -> dict[str, Any]:
    ours, theirs = bench.artifact("nf4"), bench.artifact("peer")

    def opened(worker: str, path: Path, **options: Any) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            if not path.exists():
                return {"absent": "the peer's checkpoint could not be made"}
            warm_cache(path)
            return bench.worker(worker, path=path, **options)

        return measure

    return bench.interleaved(
        {
            "vlmbuild, unverified": opened("load", ours, processor=ours, side=VLMBUILD),
            "vlmbuild, verified": opened("load", ours, processor=ours, side=VLMBUILD, verify=True),
            "hash on all cores": opened("hash_files", ours),
            "transformers, its own": opened("load", theirs, processor=ours, side=TRANSFORMERS),
            "transformers, ours": opened("load", ours, processor=ours, side=TRANSFORMERS),
        },
    )


def part_c(bench: Bench) -> dict[str, Any]:
    return {worker: with_agreement(bench.interleaved(models(bench, worker))) for worker in ("forward", "backward")}


def part_d(bench: Bench) -> dict[str, Any]:
    figures = bench.interleaved(models(bench, "decode"))
    measured = [bench.worker("bandwidth") for _ in range(bench.rounds)]
    read = {name: token_bytes(bench.artifact(name)) for name in ("nf4", "bf16")}
    for case, record in figures.items():
        if "absent" not in record:
            record["bytes_per_token"] = read["nf4" if SIDES[case][1] else "bf16"]
    return figures | {"bandwidth": {key: max(one[key] for one in measured) for key in ("read", "copy", "threads")}}


def part_e(bench: Bench) -> dict[str, Any]:
    artifact = bench.artifact("nf4")
    packed = sum(tensor.nbytes for tensor in tensors(artifact).values())
    disk = sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
    return {"bytes": disk, "packed_bytes": packed, "ratio": disk / packed, "difference": disk - packed}


def models(bench: Bench, worker: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Run a worker on both sides, each on 4-bit and on bfloat16 weights."""

    def measure(side: str, quantized: bool) -> dict[str, Any]:
        path = bench.artifact("nf4" if quantized else "bf16")
        warm_cache(path)
        return bench.worker(worker, side=side, path=path)

    return {case: partial(measure, *said) for case, said in SIDES.items()}


def with_agreement(figures: dict[str, Any]) -> dict[str, Any]:
    """Replaces logits by relative distances: of the two sides, since a speed counts only where results agree, and of NF4
    from bfloat16."""
    logits = {case: record.pop("logits", None) for case, record in figures.items()}
    pairs = {
        ("vlmbuild nf4", "off_transformers"): "transformers nf4",
        ("vlmbuild bf16", "off_transformers"): "transformers bf16",
        ("vlmbuild nf4", "off_bf16"): "vlmbuild bf16",
        ("transformers nf4", "off_bf16"): "transformers bf16",
    }
    for (case, key), other in pairs.items():
        if logits[case] and logits[other]:
            difference = [a - b for a, b in zip(logits[case], logits[other], strict=True)]
            figures[case][key] = math.hypot(*difference) / math.hypot(*logits[other])
    return figures


def tensors(artifact: Path) -> Mapping[str, Any]:
    from vlmbuild.artifact.weights_reader import CheckpointWeights

    return CheckpointWeights(artifact).tensors


def token_bytes(artifact: Path) -> int:
    """Count the bytes of weights that one token of text reads: everything but the vision tower; the tied head is counted
    in place of the embedding, of which one row is read."""
    skipped = ("quant_map", "quant_state")
    stored = tensors(artifact).items()
    return sum(info.nbytes for name, info in stored if "visual." not in name and not any(s in name for s in skipped))


def open_bench(arguments: argparse.Namespace, work: Path) -> Bench:
    """Makes the checkpoints that are not given."""
    from tests.bench.random_checkpoint import CONFIG, config_values, write_checkpoint

    checkpoint = (arguments.checkpoint or work / "checkpoint").absolute()
    deep = (arguments.deep_checkpoint or work / "checkpoint-deep").absolute()
    wanted = {checkpoint: 1} | ({deep: 2} if "a" in arguments.only else {})
    for path, factor in wanted.items():
        if not path.exists():
            print(f"writing {path.name}", flush=True)
            write_checkpoint(path, config_values(CONFIG, None, None, factor), CONFIG, seed=0, rank=64)
    return Bench(work.absolute(), checkpoint, deep, arguments.rounds, arguments.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help="parts, as in a,c")
    parser.add_argument("--checkpoint", type=Path, help="from tests.bench.random_checkpoint; made when it is not there")
    parser.add_argument("--deep-checkpoint", type=Path, help="the same with --depth-factor 2")
    parser.add_argument(
        "--work", type=Path, help="where artifacts are made, and found again; a temporary directory if not given"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=machine()["processors"], help="of every measured process")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(PARTS):
        parser.error(f"unknown part {min(unknown)}; there are {', '.join(PARTS)}")
    report: dict[str, Any] = machine() | {"rounds": arguments.rounds, "threads": arguments.threads}
    with tempfile.TemporaryDirectory(prefix="vlmbuild-bench-") as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = open_bench(arguments, work)
        runners = {"a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e}
        report |= {name: runners[name](bench) for name in PARTS if name in arguments.only}
    report["bars"] = bars(report)
    show(report)
    write_report(arguments.output, report)


if __name__ == "__main__":
    main()
