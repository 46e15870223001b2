"""How the weight of a linear layer may be stored in fewer bits: the layouts of bitsandbytes, and of ONNX Runtime."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share a scale in a 4-bit weight."""

NESTED_BLOCKSIZE = 256
"""Scales of a 4-bit weight that share one scale of their own."""


@dataclass(frozen=True, slots=True)
class FourBit:
    """Two weights in a byte, with one scale for each block (QLoRA, arXiv:2305.14314, section 3).

    Attributes:
        name: "nf4" (4-bit NormalFloat) or "fp4".
        blocksize: Weights per scale.
        double_quant: Whether the scales are stored in 8 bits too, in blocks of 256.
    """

    name: Literal["nf4", "fp4"] = "nf4"
    blocksize: int = 64
    double_quant: bool = True

    def bits(self, shape: tuple[int, ...]) -> int:
        """Bits that a weight of this shape takes with its scales."""
        count = math.prod(shape)
        blocks = math.ceil(count / self.blocksize)
        scales = 8 * blocks + 32 * math.ceil(blocks / NESTED_BLOCKSIZE) if self.double_quant else 32 * blocks
        return 8 * math.ceil(count / 2) + scales

    def describe(self) -> str:
        """For people: "nf4, blocks of 64, scales in 8 bits"."""
        return f"{self.name}, blocks of {self.blocksize}{', scales in 8 bits' if self.double_quant else ''}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "blocksize": self.blocksize, "double_quant": self.double_quant}


@dataclass(frozen=True, slots=True)
class EightBit:
    """One signed byte a weight, with one scale for each row (LLM.int8, arXiv:2208.07339, section 3).

    Attributes:
        threshold: Columns of the input with a value above it are multiplied in 16 bits; 0 for none.
    """

    threshold: float = 6.0

    @property
    def name(self) -> str:
        """As recipes have it."""
        return "int8"

    def bits(self, shape: tuple[int, ...]) -> int:
        """Bits that a weight of this shape takes with its scales."""
        return 8 * math.prod(shape) + 32 * shape[0]

    def describe(self) -> str:
        """For people: "int8, outliers above 6.0"."""
        return f"int8, outliers above {self.threshold}" if self.threshold else "int8"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "threshold": self.threshold.hex()}


@dataclass(frozen=True, slots=True)
class BlockInt4:
    """Two integers in a byte, with a scale for each block of a row, as ONNX Runtime's MatMulNBits reads them.

    Attributes:
        blocksize: Weights of a row per scale.
        symmetric: Whether the middle code is zero; else every block has a zero point of its own.
        exact_inputs: Whether products are of the inputs' own values; else of those rounded to 8 bits in blocks.
    """

    blocksize: int = 32
    symmetric: bool = True
    exact_inputs: bool = False

    @property
    def name(self) -> str:
        """As recipes have it."""
        return "int4"

    def bits(self, shape: tuple[int, ...]) -> int:
        """Bits that a weight of this shape takes with its scales, which are counted in float32."""
        blocks = shape[0] * math.ceil(shape[1] / self.blocksize)
        return blocks * (4 * self.blocksize + 32 + (0 if self.symmetric else 4))

    def describe(self) -> str:
        """For people: "int4, blocks of 32"."""
        zero, inputs = "" if self.symmetric else " with zero points", ", exact inputs" if self.exact_inputs else ""
        return f"int4, blocks of {self.blocksize}{zero}{inputs}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "blocksize": self.blocksize,
            "symmetric": self.symmetric,
            "exact_inputs": self.exact_inputs,
        }


WeightFormat = FourBit | EightBit | BlockInt4


def format_from_json(values: dict[str, Any]) -> WeightFormat:
    """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
    if values["name"] == "int8":
        return EightBit(float.fromhex(values["threshold"]))
    if values["name"] == "int4":
        return BlockInt4(values["blocksize"], values["symmetric"], values["exact_inputs"])
    if values["name"] not in ("nf4", "fp4"):
        raise ValueError(f"the weight format {values['name']!r} is unknown")
    return FourBit(values["name"], values["blocksize"], values["double_quant"])
