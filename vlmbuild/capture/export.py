"""Trace a family's model into an exported program: on meta tensors, from its config alone, dynamic in every batch dimension.

Attention is captured as one operator, `vlmbuild::attention`, through the interfaces that transformers offers for other
implementations; nothing of transformers is patched. The implementation's name contains "flash" because that is what makes
vision towers pass `cu_seqlens` instead of splitting the sequence in Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.capture.dedup_blocks import trace_once
from vlmbuild.errors import CaptureError
from vlmbuild.families import Family, KeyGroups
from vlmbuild.ir.dims import Dim, evaluate_shape, shape_names
from vlmbuild.ir.program import Input
from vlmbuild.util.gc_paused import resting_collector

ATTENTION = "vlmbuild_flash"

# Distinct sizes, none of them 0 or 1 (which export specialises), so that equal sizes are never taken for equal symbols.
_EXAMPLE_SIZES = (3, 23, 13, 7, 19, 29)


@dataclass(frozen=True, slots=True)
class Trace:
    """One traced variant: the exported program (training IR), its inputs, and its symbols' dimension names."""

    exported: ExportedProgram
    inputs: tuple[Input, ...]
    dimensions: dict[str, str]


@resting_collector()
def capture(family: Family, config: Any, variant: str) -> Trace:
    """Trace one variant.

    Args:
        family: Gives the module and its inputs.
        config: The transformers config.
        variant: A key of `family.variants(config)`.

    Raises:
        CaptureError: The model cannot be traced, or not with the promised dynamic dimensions.
    """
    inputs = family.variants(config)[variant]
    what = f"variant {variant!r} of {family.name}"
    try:
        return export(trace_once(family.module(config, variant, ATTENTION)), inputs, what)
    except CaptureError:  # what trace_once puts into blocks may be in the way; a limit of the model itself shows again
        return export(family.module(config, variant, ATTENTION), inputs, what)


def export(module: nn.Module, inputs: tuple[Input, ...], what: str) -> Trace:
    """`torch.export` (non-strict) of a module on meta tensors with the inputs' dimensions dynamic."""
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
            f"Cannot trace {what} with dynamic {', '.join(names)}: {error}\nThis is a limit of vlmbuild, or the "
            "installed transformers is outside the tested range; please report it with the config.json."
        ) from error
    return Trace(exported, inputs, _dimension_names(exported, inputs))


def _dimension_names(exported: ExportedProgram, inputs: tuple[Input, ...]) -> dict[str, str]:
    """Symbol -> dimension name, from the traced inputs' shapes; a dimension that got specialised is an error."""
    traced = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    names: dict[str, str] = {}
    for entry in inputs:
        for axis, size in enumerate(entry.shape):
            if not isinstance(size, Dim):
                continue
            found = traced[entry.name].shape[axis]
            if isinstance(found, int):
                raise CaptureError(
                    f"Dimension {axis} ({size}) of input {entry.name} became the constant {found} while tracing."
                )
            (symbol,), (name,) = found.node.expr.free_symbols, size.names
            names[str(symbol)] = name
    return names


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | KeyGroups | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value `[batch, heads, length, head_dim]`; 2-D padding mask, or
    `KeyGroups` from a family whose masks are neither padding nor causal."""
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    operator = torch.ops.vlmbuild.attention
    if isinstance(attention_mask, KeyGroups):
        return operator(query, key, value, None, None, *attention_mask, False, scale), None
    return operator(query, key, value, attention_mask, cu_seq_lens_q, None, None, causal, scale), None


def _padding_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """transformers' mask interface: hand on the 2-D padding mask; the operator knows causality by its flag."""
    return attention_mask


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _padding_mask)
