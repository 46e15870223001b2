"""4-bit integers in blocks of a row, as ONNX Runtime's MatMulNBits reads them. Only ONNX models hold this format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from vlmbuild.formats import PackedWeight, RoundedChunk, StaticShape, WeightFormat
from vlmbuild.util.lazy import LazyModule
from vlmbuild.util.validation import boolean, one_of, require_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlmbuild.quant import ort_matmul
else:
    torch, ort_matmul = LazyModule("torch"), LazyModule("vlmbuild.quant.ort_matmul")

BLOCK_SIZES: Final = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Int4(WeightFormat):
    """Two integers in a byte, with a scale for each block of a row.

    Attributes:
        blocksize: Weights of a row per scale.
        symmetric: True if the middle code is zero; else every block has a zero point of its own.
        exact_inputs: True if products use the inputs' own values; else inputs rounded to 8 bits in blocks.
    """

    blocksize: int = 64
    symmetric: bool = True
    exact_inputs: bool = False

    name: ClassVar[str] = "int4"
    targets: ClassVar[tuple[str, ...]] = ("onnx",)
    looked_up: ClassVar[bool] = True
    default_roles: ClassVar[tuple[str, ...]] = (
        "language",
        *(f"{role}=int8" for role in ("vision", "projector", "embedding", "head")),
    )

    def __post_init__(self) -> None:
        one_of("blocksize of int4", self.blocksize, BLOCK_SIZES)
        boolean("symmetric", self.symmetric)
        boolean("exact_inputs", self.exact_inputs)

    def bits(self, shape: StaticShape) -> int:
        """Count the bits, with scales in float32."""
        blocks = shape[0] * math.ceil(shape[1] / self.blocksize)
        return blocks * (4 * self.blocksize + 32 + (0 if self.symmetric else 4))

    def describe(self, target: str = "trainable") -> str:
        zero, inputs = "" if self.symmetric else " with zero points", ", exact inputs" if self.exact_inputs else ""
        return f"int4, blocks of {self.blocksize}{zero}{inputs}"

    def onnx_weight(self, shape: StaticShape, dtype: torch.dtype, name: str) -> PackedWeight:
        level = ort_matmul.EXACT if self.exact_inputs else ort_matmul.INTEGER
        return ort_matmul.matmul_nbits(4, self.blocksize, level, shape, dtype, zero_points=not self.symmetric)

    def encode_onnx(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[RoundedChunk]:
        for chunk in chunks:
            rows = chunk.view(-1, shape[1]).float()
            require_finite(rows, f"The tensor {name}")
            parts = self.pack(rows, dtype)
            yield RoundedChunk(rows, ort_matmul.unpacked_rows(4, parts, shape[1]), parts)

    def pack(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Quantize float32 [rows, in] to parts by suffix: value = (code - zero point) * scale.

        Codes are 0 to 15, two a byte, the first one low. Symmetric blocks have the zero point 8, and the value of greatest
        magnitude becomes -8 scales. Scales are rounded to `dtype` first, so that codes fit what is stored.
        """
        blocks = ort_matmul.in_blocks(rows, self.blocksize)
        if self.symmetric:
            lowest, highest = blocks.amin(-1), blocks.amax(-1)
            greatest = torch.where(-lowest > highest, lowest, highest)
            scales, zero = (greatest / -8).to(dtype), torch.full_like(lowest, 8)
        else:
            lowest, highest = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
            scales = ((highest - lowest) / 15).to(dtype)
            zero = (-lowest / _divisor(scales)).round().clamp(0, 15)
        codes = (blocks / _divisor(scales)[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8)
        parts = {"": ort_matmul.two_a_byte(codes), "_scales": scales.flatten()}
        return (
            parts if self.symmetric else parts | {"_zero_points": ort_matmul.two_a_byte(zero.to(torch.uint8)).flatten()}
        )


def _divisor(scales: Tensor) -> Tensor:
    """Return float32 scales, with 1 for blocks of zeros."""
    wide = scales.float()
    return torch.where(wide == 0, 1.0, wide)
