"""What the kernels are to reach on an H100, judged on measured rows; figures of others are their authors'."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

FLASH_ATTENTION_3_BACKWARD = {
    64: {1024: 363e12, 4096: 453e12, 16384: 474e12},
    128: {1024: 424e12, 4096: 542e12, 16384: 561e12},
}
"""Head dimension -> row length -> FLOPs a second, dense, not causal (arXiv:2407.08608, section 4.1, H100 SXM5)."""


@dataclass(frozen=True)
class Bar:
    """A goal.

    Attributes:
        text: What is to be reached.
        of: Rows that it is for.
        margin: (row, all rows) -> what is reached over what is to be, or None where a peer is missing; at least 1 holds it.
    """

    text: str
    of: Callable[[Row], bool]
    margin: Callable[[Row, Sequence[Row]], float | None]


def judged(rows: Sequence[Row]) -> list[Row]:
    """Each bar with its worst row."""
    found = []
    for bar in BARS:
        margins = [(bar.margin(row, rows), row["name"]) for row in rows if bar.of(row)]
        known = [(margin, name) for margin, name in margins if margin is not None]
        worst = min(known, default=(None, "nothing was measured"))
        found.append(
            {
                "bar": bar.text,
                "held": None if worst[0] is None else worst[0] >= 1,
                "margin": worst[0],
                "worst": worst[1],
            }
        )
    return found


def rate(row: Row) -> float:
    """FLOPs a second."""
    return float(row["flops"] / row["median_ms"] * 1e3)


def _forward(row: Row) -> bool:
    return bool(row["kernel"] == "attention forward")


def _is_dense_128(row: Row) -> bool:
    return (
        _forward(row)
        and row["sizes"]["dim"] == 128
        and row["sizes"]["segments"] == 1
        and row["sizes"]["length"] >= 4096
    )


def _is_packed_or_80(row: Row) -> bool:
    """Where tensor cores are the limit, as they are for the dense rows."""
    sizes = row["sizes"]
    return (
        _forward(row)
        and row["limited_by"] == "tensor cores"
        and sizes["length"] >= 4096
        and (sizes["segments"] > 1 or sizes["dim"] == 80)
    )


def _of(kernel: str, **least: int) -> Callable[[Row], bool]:
    """Rows of kernels that start so, with sizes of at least these."""
    return lambda row: (
        row["kernel"].startswith(kernel) and all(row["sizes"][name] >= many for name, many in least.items())
    )


def _faster(peer: str, factor: float = 1.0) -> Callable[[Row, Sequence[Row]], float | None]:
    """The peer's time over ours and the factor."""

    def margin(row: Row, _: Sequence[Row]) -> float | None:
        other = row["peers"].get(peer, {}).get("median_ms")
        return None if other is None else float(other / row["median_ms"] / factor)

    return margin


def _against_dense_128(row: Row, rows: Sequence[Row]) -> float | None:
    """Its rate over nine tenths of that of the dense row whose FLOPs are nearest."""
    dense = [other for other in rows if _is_dense_128(other)]
    if not dense:
        return None
    nearest = min(dense, key=lambda other: abs(math.log(other["flops"] / row["flops"])))
    return rate(row) / (0.9 * rate(nearest))


def _against_flash_attention_3(row: Row, _: Sequence[Row]) -> float | None:
    sizes = row["sizes"]
    published = FLASH_ATTENTION_3_BACKWARD.get(sizes["dim"], {}).get(sizes["length"])
    return None if published is None else rate(row) / (0.76 * published)


def _memory(row: Row, _: Sequence[Row]) -> float | None:
    other = row["peers"].get("liger", {}).get("peak_bytes")
    return None if other is None else float(other / row["peak_bytes"])


BARS: Iterable[Bar] = (
    Bar("attention forward, d128, 4k to 16k: 450 TFLOP/s", _is_dense_128, lambda row, _: rate(row) / 450e12),
    Bar("attention forward, d128, 4k to 16k: no slower than FlexAttention", _is_dense_128, _faster("flex")),
    Bar(
        "attention forward, packed or d80: 90 % of the dense d128 rate at equal FLOPs",
        _is_packed_or_80,
        _against_dense_128,
    ),
    Bar(
        "attention backward: 76 % of FlashAttention-3's published rate",
        lambda row: (
            row["kernel"] == "attention backward" and not row["sizes"]["causal"] and row["sizes"]["segments"] == 1
        ),
        _against_flash_attention_3,
    ),
    Bar(
        "rotation, 4k rows and more: 85 % of memory bandwidth",
        _of("rotation", rows=4096),
        lambda row, _: row["share"] / 0.85,
    ),
    Bar(
        "rotation, 4k rows and more: 9 times transformers eager",
        _of("rotation", rows=4096),
        _faster("transformers eager", 9),
    ),
    Bar("rotation, 4k rows and more: no slower than Liger's", _of("rotation", rows=4096), _faster("liger")),
    Bar(
        "linear and cross-entropy: no slower than transformers",
        _of("linear and cross-entropy"),
        _faster("transformers"),
    ),
    Bar("linear and cross-entropy: no more memory than Liger's", _of("linear and cross-entropy"), _memory),
)
