"""Tables and goals of `quantize.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.bench.fresh import bar, print_bars

TOKENS = 256
Report = Mapping[str, Any]


def show(report: Report) -> None:
    """Print every part that was measured, then the bars."""
    print(
        f"\n{report['machine']}, {report['processors']} processors ({' '.join(report['instructions'])}), {report['threads']} threads, {report['date']}"
    )
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(f"medians of {report['rounds']} rounds, each in a fresh process, files in the page cache")
    for part, table in {"a": _build, "b": _load, "c": _speed, "d": _decode, "e": _size}.items():
        if part in report:
            table(report[part])
    print_bars(report["bars"])


def _build(figures: Report) -> None:
    print(f"\n{'a build NF4':32} {'call':>8} {'process':>8} {'peak':>9} {'anonymous':>9}")
    for case, record in figures.items():
        if case == "equality":
            continue
        _row(case, record)
        for stage, seconds in record.get("stages", {}).items():
            print(f"    {stage:28} {seconds:6.1f} s")
    if equal := figures.get("equality"):
        counts = [f"{kind} {count} ({equal['differ'][kind]} differ)" for kind, count in equal["both"].items()]
        missing = f"{len(equal['only_ours'])} only ours, {len(equal['only_theirs'])} only theirs"
        print(f"  tensors in both: {', '.join(counts)}; {missing}; scales are the same where both run on one thread")


def _load(figures: Report) -> None:
    print(f"\n{'b load':32} {'call':>8} {'process':>8} {'peak':>9} {'anonymous':>9}")
    for case, record in figures.items():
        _row(case, record)


def _row(case: str, record: Report) -> None:
    if "absent" in record:
        print(f"  {case:30} absent: {record['absent']}")
        return
    memory = "".join(f" {record[key] / 1e6:6.0f} MB" for key in ("peak_resident", "peak_anonymous"))
    print(f"  {case:30} {record['seconds']:6.2f} s {record['process_seconds']:6.1f} s{memory}")


def _speed(figures: Report) -> None:
    for worker, title in (("forward", "c forward"), ("backward", "c forward and backward, LoRA")):
        print(f"\n{f'{title}, {TOKENS} tokens':40} {'tokens/s':>9}  {'of vlmbuild bf16':>16}")
        base = figures[worker]["vlmbuild bf16"]["seconds"]
        for case, record in figures[worker].items():
            if "absent" in record:
                print(f"  {case:38} absent: {record['absent']}")
                continue
            off = {"off_transformers": "transformers'", "off_bf16": "bf16"}
            note = "".join(f"  logits {record[key]:.1e} off {than}" for key, than in off.items() if key in record)
            note += f"  loss {record['loss']:.4f}" if "loss" in record else ""
            print(f"  {case:38} {TOKENS / record['seconds']:9.1f}  {base / record['seconds']:15.2f}x{note}")


def _decode(figures: Report) -> None:
    limit = figures["bandwidth"]
    print(f"\nd one token a forward pass; memory: {limit['read'] / 1e9:.1f} GB/s read,")
    print(f"  {limit['copy'] / 1e9:.1f} GB/s copied by {limit['threads']} threads")
    print(f"  {'':38} {'tokens/s':>9} {'GB/token':>9} {'GB/s':>7} {'of read':>8}")
    for case, record in figures.items():
        if case == "bandwidth":
            continue
        if "absent" in record:
            print(f"  {case:38} absent: {record['absent']}")
            continue
        _decode_row(case, record["seconds"], record["bytes_per_token"], limit["read"])
        if "generate" in record:
            _decode_row(f"{case}, generate", record["generate"], record["bytes_per_token"], limit["read"])


def _decode_row(case: str, seconds: float, read: int, limit: float) -> None:
    rate = read / seconds
    print(f"  {case:38} {1 / seconds:9.2f} {read / 1e9:9.3f} {rate / 1e9:7.1f} {rate / limit:8.0%}")


def _size(figures: Report) -> None:
    print(
        f"\ne {figures['bytes'] / 1e6:.1f} MB on disk, {figures['packed_bytes'] / 1e6:.1f} MB of tensors: "
        f"{figures['ratio']:.4f}x, {figures['difference'] / 1e6:.2f} MB more"
    )


def bars(report: Report) -> list[dict[str, Any]]:
    """Compare the measured parts with the goals."""
    parts = {"a": _build_bars, "b": _load_bars, "c": _speed_bars, "d": _decode_bars, "e": _size_bars}
    return [one for part, goals in parts.items() if part in report for one in goals(report[part])]


def _build_bars(figures: Report) -> Iterator[dict[str, Any]]:
    ours, theirs, deep = (figures[case] for case in ("vlmbuild", "transformers", "vlmbuild, twice as deep"))
    if "absent" not in theirs:
        yield bar("build: transformers / vlmbuild", ">= 4", theirs["seconds"] / ours["seconds"])
        equal = figures["equality"]
        missing = len(equal["only_ours"]) + len(equal["only_theirs"])
        unequal = equal["differ"]["packed"] + equal["differ"]["plain"] + missing
        yield bar("build: packed and plain weights that differ", "<= 0", unequal)
    yield bar("build: peak resident memory, GB", "<= 1.2", ours["peak_resident"] / 1e9)
    yield bar("build: peak, twice as deep / as published", "<= 1.15", deep["peak_resident"] / ours["peak_resident"])


def _load_bars(figures: Report) -> Iterator[dict[str, Any]]:
    fast, verified, hashed, theirs = (
        figures[case]
        for case in ("vlmbuild, unverified", "vlmbuild, verified", "hash on all cores", "transformers, its own")
    )
    if "absent" not in theirs:
        yield bar("load: unverified / transformers", "<= 1.0", fast["seconds"] / theirs["seconds"])
    floor = max(hashed["seconds"], fast["seconds"])
    yield bar("load: verified / max(hash on all cores, unverified)", "<= 1.3", verified["seconds"] / floor)


def _speed_bars(figures: Report) -> Iterator[dict[str, Any]]:
    for worker, title in (("forward", "forward"), ("backward", "forward and backward")):
        plain, quantized = (figures[worker][f"vlmbuild {kind}"]["seconds"] for kind in ("bf16", "nf4"))
        yield bar(f"{title}: NF4 / bf16 tokens per second", ">= 0.8", plain / quantized)


def _decode_bars(figures: Report) -> Iterator[dict[str, Any]]:
    theirs, ours = (figures[f"{side} nf4"] for side in ("transformers", "vlmbuild"))
    if "absent" not in theirs:
        yield bar("one token: vlmbuild NF4 / transformers NF4", ">= 1.0", theirs["seconds"] / ours["seconds"])


def _size_bars(figures: Report) -> Iterator[dict[str, Any]]:
    limit = (1.02 * figures["packed_bytes"] + 5e6) / 1e6
    yield bar("size on disk, MB", f"<= {limit:.0f}", figures["bytes"] / 1e6)
