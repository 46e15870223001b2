"""What is measured of each kernel, and what it needs at least: known without a GPU.

Sizes are those of published models: Qwen2-VL-2B's and 7B's attention and layers, Llama 3.2 Vision's image rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.bench import kernel_loss_sides as losses
from tests.bench import kernel_sides as sides
from tests.bench.kernel_limits import Architecture
from tests.bench.kernel_sides import Setting, Sides


@dataclass(frozen=True)
class Problem:
    """A kernel on one size.

    Attributes:
        kernel: Which, "attention forward".
        sizes: What and how large, by name.
        flops, moved: What the result needs at least: FLOPs of bfloat16 tensor cores, bytes of memory.
        prepare: Makes inputs and calls.
    """

    kernel: str
    sizes: dict[str, Any]
    flops: float
    moved: float
    prepare: Callable[[Setting], Sides]

    @property
    def name(self) -> str:
        """The kernel and its sizes."""
        return f"{self.kernel}: " + ", ".join(f"{name} {value}" for name, value in self.sizes.items())

    def limit(self, chip: Architecture) -> tuple[float, str]:
        """Seconds that the chip needs at least, and for what."""
        return max((self.flops / chip.tensor, "tensor cores"), (self.moved / chip.bandwidth, "memory"))


def problems() -> Iterator[Problem]:
    """All of them."""
    for dim, heads in ((64, (16, 16)), (80, (16, 16)), (96, (16, 16)), (128, (12, 2)), (128, (28, 4))):
        for length in (1024, 4096, 16384):
            for causal in (False, True):
                yield from _attention(length, heads, dim, causal, 1)
        yield from _attention(4096, heads, dim, False, 4)
        yield from _attention(16384, heads, dim, True, 16)
    for rows in (1024, 4096, 16384):
        yield from _rotation(rows, (12, 2), 128)
        yield from _rotation(rows, (16, 16), 80)
    for keys in (1024, 8192, 65536):
        yield _one_row(keys, (28, 4), 128)
    yield _cross_entropy(1024, 128256)
    yield _linear_cross_entropy(2048, 1536, 151936)
    yield _linear_cross_entropy(4096, 4096, 128256)
    yield _residual_norm(4096, 3584)


def small_problems() -> Iterator[Problem]:
    """Every kernel and peer once, on sizes that Triton's interpreter takes seconds for."""
    yield from _attention(36, (4, 2), 128, True, 1)
    yield from _attention(36, (2, 2), 80, False, 2)
    yield from _rotation(9, (4, 2), 16)
    yield _one_row(600, (2, 1), 16)
    yield _cross_entropy(3, 70)
    yield _linear_cross_entropy(5, 16, 70)
    yield _residual_norm(5, 16)


def _attention(length: int, heads: tuple[int, int], dim: int, causal: bool, segments: int) -> Iterator[Problem]:
    sizes = {"length": length, "heads": f"{heads[0]}/{heads[1]}", "dim": dim, "causal": causal, "segments": segments}
    flops = 4 * length * (length // segments) * heads[0] * dim / (2 if causal else 1)
    moved = 2 * length * dim * 2 * (heads[0] + heads[1])
    for part, factor, traffic in (("forward", 1.0, 1), ("backward", 2.5, 2)):
        yield Problem(
            f"attention {part}",
            sizes,
            factor * flops,
            traffic * moved,
            lambda setting, part=part: sides.attention(setting, length, heads, dim, causal, segments)[part],
        )


def _one_row(keys: int, heads: tuple[int, int], dim: int) -> Problem:
    sizes = {"keys": keys, "heads": f"{heads[0]}/{heads[1]}", "dim": dim}
    flops, moved = 4 * keys * heads[0] * dim, 2 * 2 * keys * heads[1] * dim
    return Problem(
        "attention of one row", sizes, flops, moved, lambda setting: sides.one_row(setting, keys, heads, dim)
    )


def _rotation(rows: int, heads: tuple[int, int], dim: int) -> Iterator[Problem]:
    sizes = {"rows": rows, "heads": f"{heads[0]}/{heads[1]}", "dim": dim}
    moved = 2 * 2 * rows * sum(heads) * dim + 2 * 4 * rows * dim // 2
    for part in ("forward", "backward"):
        prepare = lambda setting, part=part: sides.rotation(setting, rows, heads, dim)[part]  # noqa: E731
        yield Problem(f"rotation {part}", sizes, 0, moved, prepare)


def _cross_entropy(rows: int, vocabulary: int) -> Problem:
    sizes = {"rows": rows, "vocabulary": vocabulary}
    prepare = lambda setting: losses.cross_entropy(setting, rows, vocabulary)  # noqa: E731
    return Problem("cross-entropy with gradient", sizes, 0, 2 * 2 * rows * vocabulary, prepare)


def _linear_cross_entropy(rows: int, width: int, vocabulary: int) -> Problem:
    sizes = {"rows": rows, "width": width, "vocabulary": vocabulary}
    moved = 2 * 2 * (vocabulary + rows) * width
    prepare = lambda setting: losses.linear_cross_entropy(setting, rows, width, vocabulary)  # noqa: E731
    return Problem("linear and cross-entropy with gradients", sizes, 3 * 2 * rows * width * vocabulary, moved, prepare)


def _residual_norm(rows: int, width: int) -> Problem:
    prepare = lambda setting: sides.residual_norm(setting, rows, width)  # noqa: E731
    return Problem("sum and RMSNorm by inductor", {"rows": rows, "width": width}, 0, 4 * 2 * rows * width, prepare)
