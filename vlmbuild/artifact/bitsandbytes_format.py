"""The on-disk layout of bitsandbytes 4-bit weights: one packed weight and its quantization state."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from vlmbuild.artifact.canonical import unique_keys
from vlmbuild.artifact.weights import TensorSpec
from vlmbuild.errors import SourceError, UsageError

QUANT_TYPES: Final = ("nf4", "fp4")
BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE_PREFIX: Final = ".quant_state.bitsandbytes__"
_NESTED_BLOCK: Final = 256
_FLOATS: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def quantize(
    tensor: torch.Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    name: str = "the weight",
) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight by suffix, "" being the packed weight: what bitsandbytes puts in a state dict.

    Raises SourceError, with `name`, for a weight that is not float or holds NaN or infinity, and UsageError for an
    option that bitsandbytes does not have.
    """
    from bitsandbytes import functional  # a dependency of quantized builds only

    _check_options(quant_type, blocksize)
    if tensor.dtype not in _FLOATS.values():
        raise SourceError(f"The tensor {name} is {tensor.dtype}, which cannot be quantized. Add it to the skip list.")
    packed, state = functional.quantize_4bit(tensor.contiguous(), blocksize=blocksize, quant_type=quant_type)
    if not torch.isfinite(state.absmax).all():
        raise SourceError(
            f"The tensor {name} holds NaN or infinity. Repair the checkpoint, or add it to the skip list."
        )
    if double_quant:
        _quantize_scales(functional, state)
    suffixed = {f".{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"": packed, **suffixed}


def _quantize_scales(functional: Any, state: Any) -> None:
    """What quantize_4bit does for `compress_statistics`, except that the mean is taken on one thread.

    The sum of many floats depends on how threads share it, and with it the artifact would on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        offset = state.absmax.mean()
    finally:
        torch.set_num_threads(threads)
    state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - offset, blocksize=_NESTED_BLOCK)
    state.offset, state.nested = offset, True


def stored_specs(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
) -> tuple[TensorSpec, ...]:
    """What `quantize` will give for a weight of this shape and dtype, before it is computed.

    Only the size of the packed state is not exact: it spells out a float. Raises UsageError for an option that
    bitsandbytes does not have.
    """
    _check_options(quant_type, blocksize)
    count = math.prod(shape)
    blocks = math.ceil(count / blocksize)
    specs = [
        TensorSpec(name, torch.uint8, (math.ceil(count / 2), 1)),
        TensorSpec(f"{name}.absmax", torch.uint8 if double_quant else torch.float32, (blocks,)),
        TensorSpec(f"{name}.quant_map", torch.float32, (16,)),
    ]
    if double_quant:
        specs.append(TensorSpec(f"{name}.nested_absmax", torch.float32, (math.ceil(blocks / _NESTED_BLOCK),)))
        specs.append(TensorSpec(f"{name}.nested_quant_map", torch.float32, (256,)))
    longest = _longest_state(quant_type, blocksize, dtype, shape, double_quant)
    specs.append(TensorSpec(f"{name}{STATE_PREFIX}{quant_type}", torch.uint8, (longest,), exact=not double_quant))
    return tuple(specs)


def _longest_state(
    quant_type: str, blocksize: int, dtype: torch.dtype, shape: Sequence[int], double_quant: bool
) -> int:
    state: dict[str, object] = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if double_quant:
        # No float is spelled longer than this one.
        longest_float = -2.2250738585072014e-308
        state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": longest_float}
    return len(json.dumps(state))


def _check_options(quant_type: str, blocksize: int) -> None:
    if quant_type not in QUANT_TYPES:
        raise UsageError(f"The quantization format {quant_type!r} is unknown. Choose from {', '.join(QUANT_TYPES)}.")
    if blocksize not in BLOCK_SIZES:
        raise UsageError(f"The block size {blocksize} is not possible. Choose from {', '.join(map(str, BLOCK_SIZES))}.")


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


def quantization_config(
    *, skip_modules: Sequence[str], quant_type: str = "nf4", double_quant: bool = True, compute_dtype: str = "bfloat16"
) -> dict[str, Any]:
    """The `quantization_config` of config.json with which transformers opens the stored weights.

    `skip_modules` are full module names as transformers 5 has them (`model.visual.merger.mlp.0`), not the names on
    disk. An empty list means that every linear layer is quantized; transformers then adds nothing of its own.
    Raises UsageError for an unknown format or dtype, or a name that transformers would read as a pattern.
    """
    _check_options(quant_type, 64)
    if compute_dtype not in _FLOATS:
        raise UsageError(f"The compute dtype {compute_dtype!r} is unknown. Choose from {', '.join(_FLOATS)}.")
    for name in skip_modules:
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name):
            raise UsageError(f"The module name {name!r} in the skip list is not a plain dotted name.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(skip_modules),
        "llm_int8_threshold": 6.0,
    }


def is_skipped(module: str, skip_modules: Sequence[str]) -> bool:
    """Whether transformers 5 leaves a module unquantized: a name covers what is below it, and what ends with it."""
    return any(module == name or module.startswith(f"{name}.") or module.endswith(name) for name in skip_modules)
