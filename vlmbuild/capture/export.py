"""Trace a family's model into an exported program: on meta tensors, from its config alone, dynamic in every batch dimension.

Attention is captured as one operator, `vlmbuild::attention`, through the interfaces that transformers offers for other
implementations; no class or function of transformers is patched. The implementation's name contains "flash", since vision
towers then pass `cu_seqlens` instead of splitting the sequence in Python.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.capture.dedup_blocks import dedup_blocks
from vlmbuild.errors import CaptureError
from vlmbuild.families import Family, KeyGroups, Segments
from vlmbuild.ir.dims import Dim, evaluate_shape, shape_names
from vlmbuild.ir.program import Input
from vlmbuild.util.gc_paused import gc_paused

ATTENTION = "vlmbuild_flash"

# Distinct sizes, none of them 0 or 1 (which export specializes), so that two symbols are never taken for one.
_EXAMPLE_SIZES = (3, 23, 13, 7, 19, 29)


@dataclass(frozen=True, slots=True)
class Trace:
    """One traced variant.

    Attributes:
        exported: The exported program (training IR).
        inputs: The variant's inputs.
        dimensions: Symbol -> name of the program's dimension.
    """

    exported: ExportedProgram
    inputs: tuple[Input, ...]
    dimensions: dict[str, str]


@gc_paused()
def capture(family: Family, config: Any, variant: str) -> Trace:
    """Trace one variant of `family.variants(config)`.

    Raises:
        CaptureError: The model cannot be traced with its promised dynamic dimensions.
    """
    inputs = family.variants(config)[variant]
    what = f"variant {variant!r} of {family.name}"
    module = family.module(config, variant, ATTENTION)
    try:
        with dedup_blocks(module):
            return export(module, inputs, what)
    except CaptureError as error:
        trace = export(module, inputs, what)  # raises again if the model itself is the reason
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"Traced every block of {what} by itself, which takes longer: repeated blocks could not be traced once. Report "
            f"this with the config.json: {reason}",
            stacklevel=2,
        )
        return trace


def export(module: nn.Module, inputs: tuple[Input, ...], what: str) -> Trace:
    """Export a module on the meta device (`torch.export`, non-strict) with the dimensions of its inputs dynamic; messages
    call it `what`.

    Raises:
        CaptureError: It cannot be traced with these dynamic dimensions.
    """
    names = sorted(shape_names(entry.shape for entry in inputs))
    if len(names) > len(_EXAMPLE_SIZES):
        raise CaptureError(
            f"{what} has {len(names)} dynamic dimensions ({', '.join(names)}); at most {len(_EXAMPLE_SIZES)} can be traced. "
            "Give inputs of one length one name in the family's `variants`."
        )
    sizes = dict(zip(names, _EXAMPLE_SIZES[: len(names)], strict=True))
    dims = {name: torch.export.Dim(name) for name in names}
    example = {
        entry.name: torch.empty(evaluate_shape(entry.shape, sizes), dtype=entry.dtype, device="meta")
        for entry in inputs
    }
    shapes = {
        entry.name: {axis: size.evaluate(dims) for axis, size in enumerate(entry.shape) if isinstance(size, Dim)}
        for entry in inputs
    }
    try:
        exported = torch.export.export(module, (), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises many types, all of them about the model
        raise CaptureError(
            f"Cannot trace {what} with dynamic {', '.join(names)}: {error}\nInstall a transformers version of the tested "
            "range; if that fails too, report it with the config.json."
        ) from error
    return Trace(exported, inputs, _dimension_names(exported, inputs))


def _dimension_names(exported: ExportedProgram, inputs: tuple[Input, ...]) -> dict[str, str]:
    """Map symbols to dimension names, from the traced inputs' shapes. Raises CaptureError for a dimension that became
    constant."""
    traced = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    names: dict[str, str] = {}
    for entry in inputs:
        for axis, size in enumerate(entry.shape):
            if not isinstance(size, Dim):
                continue
            traced_size = traced[entry.name].shape[axis]
            if isinstance(traced_size, int):
                raise CaptureError(
                    f"Dimension {axis} ({size}) of input {entry.name} became the constant {traced_size} in the trace: the "
                    "model's code uses the example's size. Install a transformers version of the tested range; if that "
                    "fails too, report it with the config.json."
                )
            (symbol,), (name,) = traced_size.node.expr.free_symbols, size.names
            names[str(symbol)] = name
    return names


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | KeyGroups | Segments | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    lookahead: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Implement transformers' attention interface: query, key, value `[batch, heads, length, head_dim]`; 2-D padding mask,
    or `KeyGroups` or `Segments` from a family whose masks are neither padding nor causal.

    Layers pass `sliding_window` themselves; a family passes `lookahead` (tokens,) through the model's keywords.
    """
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    operator = torch.ops.vlmbuild.attention
    if isinstance(attention_mask, KeyGroups):
        return operator(query, key, value, None, None, *attention_mask, False, scale), None
    if isinstance(attention_mask, Segments):
        cu_seq_lens_q = attention_mask.cu_seqlens
        attention_mask = None
    ahead = None if lookahead is None else lookahead.unsqueeze(0)
    masks = (attention_mask, cu_seq_lens_q, None, None)
    return operator(query, key, value, *masks, causal, scale, ahead, sliding_window), None


def _padding_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """Implement transformers' mask interface: pass the 2-D padding mask through; the operator has a flag for causality."""
    return attention_mask


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _padding_mask)
