"""The tensors of a source as the model has them: one for each parameter, plain or quantized with what belongs to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.errors import SourceError
from vlmbuild.families import Family
from vlmbuild.formats import NESTED_BLOCKSIZE, EightBit, FourBit, WeightFormat
from vlmbuild.ir.program import Program
from vlmbuild.quant.bnb_4bit import STATE_PREFIX, parse_quant_state
from vlmbuild.quant.bnb_config import MIXED, announced_format, check_method, is_skipped, threshold_of
from vlmbuild.quant.decide import linear_layers

_STATES = tuple(f"{STATE_PREFIX}{name}" for name in ("nf4", "fp4"))


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A parameter in a source.

    Attributes:
        name: Of its tensor in the files.
        shape: Of the parameter.
        dtype: Of the parameter, once it is dequantized.
        nbytes: That its tensors take.
        format: None for a plain tensor.
        parts: Names of all its tensors, `name` first.
        nested_offset: Of the scales of a double-quantized weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    format: WeightFormat | None = None
    parts: tuple[str, ...] = ()
    nested_offset: float | None = None


def source_tensors(weights: CheckpointWeights, family: Family, config: Mapping[str, Any]) -> dict[str, SourceTensor]:
    """Every parameter of a source by module name. `config` holds the values of config.json.

    Reads headers, and the states of 4-bit weights (some hundred bytes each).

    Raises:
        SourceError: It is quantized in a layout that is not known, or the parts of a weight do not fit each other.
    """
    where = str(weights.directory)
    quantization = config.get("quantization_config")
    threshold = threshold_of(check_method(quantization, where)) if quantization is not None else 0.0
    found: dict[str, SourceTensor] = {}
    taken: set[str] = set()
    for name in weights.tensors if quantization is not None else ():
        state = next((suffix for suffix in _STATES if name.endswith(suffix)), None)
        if state is not None:
            tensor = _four_bit(weights, name.removesuffix(state), state)
        elif name.endswith(".SCB"):
            tensor = _eight_bit(weights, name.removesuffix(".SCB"), threshold)
        else:
            continue
        found[family.module_name(tensor.name)] = tensor
        taken.update(tensor.parts)
    for name, info in weights.tensors.items():
        if name not in taken:
            found[family.module_name(name)] = SourceTensor(name, info.shape, info.dtype, info.nbytes, None, (name,))
    return found


def stored_formats(tensors: Mapping[str, SourceTensor]) -> dict[str, WeightFormat]:
    """Module -> format of the layers that are quantized."""
    return {
        name.removesuffix(".weight"): tensor.format for name, tensor in tensors.items() if tensor.format is not None
    }


def announced_formats(
    family: Family, values: Mapping[str, Any], program: Program, where: str
) -> Mapping[str, WeightFormat]:
    """Formats of a quantized source's linear layers, by module name, from config.json alone.

    Raises:
        SourceError: Its weights have formats that the config cannot tell apart.
    """
    config = values.get("quantization_config")
    if config is None:
        return {}
    if config.get("quant_method") == MIXED:
        raise SourceError(
            f"{where} has 4-bit and 8-bit weights, and only they can tell which is which. Put them beside config.json."
        )
    names, skipped = published_name(family), config.get("llm_int8_skip_modules") or ["lm_head"]
    form = announced_format(config)
    return {
        layer.module: form
        for layer in linear_layers(program)
        if not layer.refusal and not is_skipped(layer.module, skipped) and not is_skipped(names(layer.module), skipped)
    }


def published_name(family: Family) -> Callable[[str], str]:
    """Module name -> that in published checkpoints."""
    return lambda module: family.stored_name(f"{module}.weight").removesuffix(".weight")


def _four_bit(weights: CheckpointWeights, name: str, suffix: str) -> SourceTensor:
    """A 4-bit weight. Kernels do not check sizes, so all are held against the state."""
    state = parse_quant_state(weights.read(name + suffix), name=f"{weights.directory}: {name}{suffix}")
    double_quant = "nested_blocksize" in state
    if double_quant and state["nested_blocksize"] != NESTED_BLOCKSIZE:
        raise _unfit(weights, name, f"its scales are quantized in blocks of {state['nested_blocksize']}, not of 256")
    if state["quant_type"] != suffix.removeprefix(STATE_PREFIX):
        raise _unfit(weights, name, f"its state is of {state['quant_type']}")
    count = math.prod(state["shape"])
    blocks = math.ceil(count / state["blocksize"])
    sizes = {
        "": (torch.uint8, math.ceil(count / 2)),
        ".absmax": (torch.uint8 if double_quant else torch.float32, blocks),
        ".quant_map": (torch.float32, 16),
    }
    if double_quant:
        sizes[".nested_absmax"] = (torch.float32, math.ceil(blocks / NESTED_BLOCKSIZE))
        sizes[".nested_quant_map"] = (torch.float32, 256)
    for part, (dtype, size) in sizes.items():
        info = weights.tensors.get(name + part)
        if info is None or info.dtype != dtype or math.prod(info.shape) != size:
            has = "is missing" if info is None else f"is {list(info.shape)} of {info.dtype}"
            raise _unfit(weights, name, f"{name}{part} {has}; {size} elements of {dtype} are needed")
    parts = tuple(name + part for part in (*sizes, suffix))
    form = FourBit(state["quant_type"], state["blocksize"], double_quant)
    nbytes = sum(weights.tensors[part].nbytes for part in parts)
    return SourceTensor(name, state["shape"], state["dtype"], nbytes, form, parts, state.get("nested_offset"))


def _eight_bit(weights: CheckpointWeights, module: str, threshold: float) -> SourceTensor:
    name = f"{module}.weight"
    info, scales = weights.tensors.get(name), weights.tensors[f"{module}.SCB"]
    if info is None or info.dtype != torch.int8 or len(info.shape) != 2:
        raise _unfit(weights, name, "it is not a matrix of int8, as its SCB says")
    if scales.dtype != torch.float32 or math.prod(scales.shape) != info.shape[0]:
        raise _unfit(weights, name, f"{module}.SCB does not have one float32 for each of its {info.shape[0]} rows")
    parts = [name, f"{module}.SCB"]
    if f"{module}.weight_format" in weights.tensors:
        parts.append(f"{module}.weight_format")
        if weights.read(f"{module}.weight_format").flatten().tolist() != [0]:
            raise _unfit(weights, name, "it is laid out for a GPU's tiles, not by rows")
    nbytes = sum(weights.tensors[part].nbytes for part in parts)
    return SourceTensor(name, info.shape, torch.float16, nbytes, EightBit(threshold), tuple(parts))


def _unfit(weights: CheckpointWeights, name: str, problem: str) -> SourceError:
    return SourceError(
        f"{weights.directory}: the quantized weight {name} cannot be used: {problem}. If the checkpoint is complete, its "
        "layout is not supported: build from the unquantized one."
    )
