"""The packed quantization state that bitsandbytes stores beside a 4-bit weight: a line of JSON in a tensor of bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from vlmbuild.artifact.canonical import unique_keys
from vlmbuild.errors import SourceError
from vlmbuild.formats import BLOCK_SIZES, NESTED_BLOCKSIZE
from vlmbuild.util.dtypes import FLOATS, dtype_name

LONGEST_FLOAT: Final = -2.2250738585072014e-308
"""No float takes more characters."""
QUANT_TYPES: Final = ("nf4", "fp4")
_FLOATS: Final = {dtype_name(dtype): dtype for dtype in FLOATS}


@dataclass(frozen=True, slots=True)
class QuantState:
    """State of a quantized weight.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: Weights per scale.
        dtype: Dtype of the dequantized weight.
        shape: Shape of the dequantized weight.
        nested_offset: Offset of scales in 8 bits; None for scales in float32.
        nested_blocksize: Scales that share a scale.
    """

    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_offset: float | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE

    def pack(self) -> torch.Tensor:
        """Convert to the tensor that is stored."""
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
        }
        if self.nested_offset is not None:
            state |= {"nested_blocksize": self.nested_blocksize, "nested_dtype": "float32"}
            state |= {"nested_offset": self.nested_offset}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def parse_quant_state(tensor: torch.Tensor, *, name: str = "quant_state") -> QuantState:
    """Parse a packed state. Raises SourceError, with `name`, when it is not exactly one."""
    try:
        if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() > 2**16:
            raise ValueError(f"it is {tensor.dtype} {tuple(tensor.shape)}, not a short line of bytes")
        state = json.loads(bytes(tensor.tolist()).decode(), object_pairs_hook=unique_keys, parse_constant=_refuse)
        return _parse(state)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"The quantization state {name} cannot be used: {error}. Quantize the checkpoint again."
        ) from error


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not a finite number")


_CHECKS: Final[dict[str, Callable[[Any], bool]]] = {
    "quant_type": lambda value: value in QUANT_TYPES,
    "blocksize": lambda value: type(value) is int and value in BLOCK_SIZES,
    "dtype": lambda value: isinstance(value, str) and value in _FLOATS,
    "shape": lambda value: isinstance(value, list) and all(type(n) is int and 0 < n < 2**48 for n in value),
    "nested_blocksize": lambda value: type(value) is int and value in BLOCK_SIZES,
    "nested_dtype": lambda value: value == "float32",
    "nested_offset": lambda value: type(value) is float and math.isfinite(value),
}
_PLAIN: Final = {"quant_type", "blocksize", "dtype", "shape"}


def _parse(state: object) -> QuantState:
    if not isinstance(state, dict) or state.keys() not in (_PLAIN, _CHECKS.keys()):
        raise ValueError(f"it does not have exactly the keys {', '.join(sorted(_PLAIN))}, or also the nested ones")
    for key, value in state.items():
        if not _CHECKS[key](value):
            raise ValueError(f"{key} is {value!r}")
    values = {key: value for key, value in state.items() if key != "nested_dtype"}
    return QuantState(**{**values, "dtype": _FLOATS[state["dtype"]], "shape": tuple(state["shape"])})
