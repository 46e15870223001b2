"""The on-disk layout of bitsandbytes 4-bit weights: one packed weight and its quantization state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import torch

from vlmbuild.artifact.canonical import unique_keys
from vlmbuild.artifact.weights_writer import TensorSpec
from vlmbuild.errors import SourceError
from vlmbuild.formats import BLOCK_SIZES, NESTED_BLOCKSIZE, FourBit
from vlmbuild.quant.bnb_quantize import quantize_scales

QUANT_TYPES: Final = ("nf4", "fp4")
STATE_PREFIX: Final = ".quant_state.bitsandbytes__"
_FLOATS: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def quantized_parts(
    absmax: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, fmt: FourBit
) -> dict[str, torch.Tensor]:
    """What bitsandbytes stores beside a packed weight, by suffix: scales, tables and the packed state.

    Args:
        absmax: float32 scale of every block.
        shape: Of the weight.
        dtype: Of the weight before it was quantized, and after it is dequantized.
        fmt: Of the weight.
    """
    state: dict[str, Any] = {
        "quant_type": fmt.name,
        "blocksize": fmt.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    parts = {".absmax": absmax, ".quant_map": _table(fmt.name)}
    if fmt.double_quant:
        codes, nested, offset = quantize_scales(absmax)
        parts |= {".absmax": codes, ".nested_absmax": nested, ".nested_quant_map": _table("scales")}
        state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset.item()}
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {**parts, f"{STATE_PREFIX}{fmt.name}": packed}


@cache
def _table(name: str) -> torch.Tensor:
    """The values that codes stand for: of "nf4", "fp4", or of the scales."""
    from bitsandbytes import functional  # a dependency of quantized builds only

    make: Any = functional
    found: torch.Tensor = make.create_dynamic_map() if name == "scales" else make.get_4bit_type(name, device="cpu")
    return found


def stored_specs(name: str, shape: Sequence[int], dtype: torch.dtype, fmt: FourBit) -> tuple[TensorSpec, ...]:
    """The tensors that a weight of this shape and dtype becomes, the packed weight first, before anything is computed.

    Only the size of the packed state is not exact: it spells out a float.
    """
    count = math.prod(shape)
    blocks = math.ceil(count / fmt.blocksize)
    specs = [
        TensorSpec(name, torch.uint8, (math.ceil(count / 2), 1)),
        TensorSpec(f"{name}.absmax", torch.uint8 if fmt.double_quant else torch.float32, (blocks,)),
        TensorSpec(f"{name}.quant_map", torch.float32, (16,)),
    ]
    if fmt.double_quant:
        specs.append(TensorSpec(f"{name}.nested_absmax", torch.float32, (math.ceil(blocks / NESTED_BLOCKSIZE),)))
        specs.append(TensorSpec(f"{name}.nested_quant_map", torch.float32, (256,)))
    longest = _longest_state(dtype, shape, fmt)
    specs.append(TensorSpec(f"{name}{STATE_PREFIX}{fmt.name}", torch.uint8, (longest,), exact=not fmt.double_quant))
    return tuple(specs)


def _longest_state(dtype: torch.dtype, shape: Sequence[int], fmt: FourBit) -> int:
    state: dict[str, object] = {
        "quant_type": fmt.name,
        "blocksize": fmt.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if fmt.double_quant:
        # No float is spelled longer than this one.
        longest_float = -2.2250738585072014e-308
        state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": longest_float}
    return len(json.dumps(state))


def parse_quant_state(tensor: torch.Tensor, *, name: str = "quant_state") -> Mapping[str, Any]:
    """The packed state as a mapping: quant_type, blocksize, dtype, shape, and for nested scales nested_blocksize,
    nested_dtype and nested_offset; dtypes are torch dtypes and the shape is a tuple.

    Raises SourceError, with `name`, when it is not exactly that.
    """
    try:
        if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() > 2**16:
            raise ValueError(f"it is {tensor.dtype} {tuple(tensor.shape)}, not a short line of bytes")
        state = json.loads(bytes(tensor.tolist()).decode(), object_pairs_hook=unique_keys, parse_constant=_refuse)
        return _check_state(state)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"The quantization state {name} cannot be used: {error}. Quantize the checkpoint again."
        ) from error


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not a finite number")


def _check_state(state: object) -> Mapping[str, Any]:
    plain = {"quant_type", "blocksize", "dtype", "shape"}
    nested = plain | {"nested_blocksize", "nested_dtype", "nested_offset"}
    if not isinstance(state, dict) or state.keys() not in (plain, nested):
        raise ValueError(f"it does not have exactly the keys {', '.join(sorted(plain))}, or also the nested ones")
    checks: dict[str, Callable[[Any], bool]] = {
        "quant_type": lambda value: value in QUANT_TYPES,
        "blocksize": lambda value: type(value) is int and value in BLOCK_SIZES,
        "dtype": lambda value: isinstance(value, str) and value in _FLOATS,
        "shape": lambda value: isinstance(value, list) and all(type(n) is int and 0 < n < 2**48 for n in value),
        "nested_blocksize": lambda value: type(value) is int and value in BLOCK_SIZES,
        "nested_dtype": lambda value: value == "float32",
        "nested_offset": lambda value: type(value) is float and math.isfinite(value),
    }
    for key, value in state.items():
        if not checks[key](value):
            raise ValueError(f"{key} is {value!r}")
    parsed: dict[str, Any] = {**state, "dtype": _FLOATS[state["dtype"]], "shape": tuple(state["shape"])}
    if "nested_dtype" in state:
        parsed["nested_dtype"] = torch.float32
    return parsed
