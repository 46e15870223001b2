"""Fuse rotary position embeddings: the cos/sin tables and the rotate-half chains become one operator each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import Node

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.pipeline import PassOutcome
from vlmbuild.program import COMPUTE_DTYPE, Program, Rotary
from vlmbuild.rewrite import Rewrite, apply

aten = torch.ops.aten
mrope = torch.ops.vlmbuild


@dataclass(frozen=True, slots=True)
class FuseMrope:
    """Fuse M-RoPE and axial vision RoPE (Qwen2-VL, arXiv:2409.12191, section 2.1; RoPE, arXiv:2104.09864).

    Before, in every layer:                         After:
        rotated_q = q * cos + cat(-q2, q1) * sin        rotated_q, rotated_k = mrope_rotate(q, k, cos1, sin1)
        rotated_k = k * cos + cat(-k2, k1) * sin
    Before, once:                                   After:
        angles = position_ids * inv_freq                cos, sin = mrope_cos_sin(position_ids, inv_freq, sections, ...)
        cos = cat(angles.cos() by section) twice

    Legal because both halves of cos and sin are equal, so that the operators may read the first half only, and because
    every lane of the section mix is one product of a position and a frequency. The tables stay in float32 when all their
    readers are fused rotations; with a reader left over, the model's own cast stays too.
    """

    name: ClassVar[str] = "fuse_mrope"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for rotary in program.geometry.rotary:
            for rewrite in _rewrites(rotary):
                for name, region in program.regions.items():
                    outcome.add(name, *apply(region.graph, rewrite))
        if outcome.sites:
            _drop_table_casts(program)
        return outcome


@cache
def _rewrites(rotary: Rotary) -> tuple[Rewrite, ...]:
    return tuple(_axial_rewrites(rotary) if rotary.shared else _mixed_rewrites(rotary))


def _axial_rewrites(rotary: Rotary) -> Iterator[Rewrite]:
    """Axial embeddings rotate packed `[patches, heads, head_dim]`, in float32."""
    half = rotary.head_dim // 2
    rows: dict[int, Any] = {0: Dim("rows")}
    table = torch.empty(6, rotary.head_dim, device="meta")
    states = torch.empty(6, 2, rotary.head_dim, dtype=COMPUTE_DTYPE, device="meta")
    yield Rewrite(_axial_rotation, _fused_rotation(half), (states, states, table, table), (rows, rows, rows, rows))
    positions = torch.empty(6, len(rotary.sections), dtype=torch.int64, device="meta")
    frequencies = torch.empty(rotary.sections[0], device="meta")
    yield Rewrite(_axial_tables, _fused_tables(rotary, 1), (positions, frequencies), (rows, {}))


def _mixed_rewrites(rotary: Rotary) -> Iterator[Rewrite]:
    """M-RoPE rotates `[batch, heads, sequence, head_dim]`, in the compute dtype."""
    half = rotary.head_dim // 2
    rows: dict[int, Any] = {0: Dim("batch"), 1: Dim("rows")}
    states_rows = {0: rows[0], 2: rows[1]}
    table = torch.empty(3, 6, rotary.head_dim, dtype=COMPUTE_DTYPE, device="meta")
    states = torch.empty(3, 2, 6, rotary.head_dim, dtype=COMPUTE_DTYPE, device="meta")
    yield Rewrite(
        _rotation, _fused_rotation(half), (states, states, table, table), (states_rows, states_rows, rows, rows)
    )
    positions = torch.empty(len(rotary.sections), 3, 6, dtype=torch.int64, device="meta")
    frequencies = torch.empty(half, device="meta")
    tables = _mixed_tables(rotary)
    yield Rewrite(tables, _fused_tables(rotary, 0), (positions, frequencies), ({1: rows[0], 2: rows[1]}, {}))


def _rotate_half(states: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    return torch.cat((-states[..., half:], states[..., :half]), dim=-1)


def _rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def _axial_rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide_query, wide_key = query.float(), key.float()
    rotated_query = wide_query * cos + _rotate_half(wide_query) * sin
    rotated_key = wide_key * cos + _rotate_half(wide_key) * sin
    return rotated_query.to(query.dtype), rotated_key.to(key.dtype)


def _fused_rotation(half: int) -> Callable[..., Any]:
    def replacement(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return mrope.mrope_rotate(query, key, cos[..., :half], sin[..., :half])

    return replacement


def _axial_tables(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].float() * inv_freq

    def mix(table: Tensor) -> Tensor:
        half = torch.cat([table[:, axis] for axis in range(position_ids.shape[1])], dim=-1)
        return torch.cat([half, half], dim=-1)

    return mix(angles.cos()), mix(angles.sin())


def _mixed_tables(rotary: Rotary) -> Callable[..., Any]:
    def pattern(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * inv_freq

        def mix(table: Tensor) -> Tensor:
            parts = table.split(rotary.sections, dim=-1)
            half = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
            return torch.cat((half, half), dim=-1)

        return mix(angles.cos()), mix(angles.sin())

    return pattern


def _fused_tables(rotary: Rotary, axis: int) -> Callable[..., Any]:
    def replacement(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        moved = position_ids.movedim(axis, 0) if axis else position_ids
        cos, sin = mrope.mrope_cos_sin(moved, inv_freq, rotary.sections, rotary.shared, 1.0)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    return replacement


def _drop_table_casts(program: Program) -> None:
    """Hand float32 tables from region to region where every reader is a fused rotation."""
    for name, region in program.regions.items():
        results = region.results()
        casts = [
            (place, node)
            for place, node in enumerate(results)
            if node.target is aten.to.dtype and _is_table(node.args[0]) and len(node.users) == 1
        ]
        for place, node in casts:
            readers = _readers(program, name, place)
            if all(_reads_as_table(placeholder) for placeholder in readers):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                for placeholder in readers:
                    placeholder.meta["val"] = placeholder.meta["val"].float()


def _is_table(node: Any) -> bool:
    """cat((t, t)) of a table that `mrope_cos_sin` made."""
    if not isinstance(node, Node) or node.target is not aten.cat.default:
        return False
    part = node.args[0][0]  # type: ignore[index]
    return isinstance(part, Node) and part.args[0].target is mrope.mrope_cos_sin.default  # type: ignore[union-attr]


def _reads_as_table(placeholder: Node) -> bool:
    rotate = mrope.mrope_rotate.default
    return all(
        user.target is aten.slice.Tensor and all(reader.target is rotate for reader in user.users)
        for user in placeholder.users
    )


def _readers(program: Program, name: str, place: int) -> list[Node]:
    """The placeholders, in any region, that a region's result at this place is passed to."""
    found: dict[Node, None] = {}
    for variant in program.variants.values():
        values = {call.outputs[place] for call in variant.calls if call.region == name}
        for call in variant.calls:
            region = program.regions[call.region]
            activations = region.placeholders()[len(region.slots) :]
            for value, placeholder in zip(call.inputs, activations, strict=True):
                if value in values:
                    found[placeholder] = None
    return list(found)
