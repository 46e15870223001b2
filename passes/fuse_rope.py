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
from vlmbuild.ir.program import COMPUTE_DTYPE, Geometry, Program, Rotary
from vlmbuild.ops.rope.op import interleave
from vlmbuild.rewrite.pass_manager import PassOutcome
from vlmbuild.rewrite.pattern import Rewrite, apply

aten = torch.ops.aten
_OPS = torch.ops.vlmbuild


@dataclass(frozen=True, slots=True)
class FuseRope:
    """Fuse rotary embeddings with one or several position axes: plain RoPE (arXiv:2104.09864), M-RoPE
    (arXiv:2409.12191, section 2.1; interleaved: arXiv:2511.21631, section 2) and axial vision RoPE with frequencies that the
    axes share or split (arXiv:2410.07073, section 2.2).

    Before, in every layer:                         After:
        rotated_q = q * cos + cat(-q2, q1) * sin        rotated_q, rotated_k = mrope_rotate(q, k, cos1, sin1)
        rotated_k = k * cos + cat(-k2, k1) * sin
    Before, once:                                   After:
        angles = position_ids * inv_freq                cos, sin = mrope_cos_sin(position_ids, inv_freq, sections, ...)
        cos = cat(angles.cos() by section) twice

    Legal because both halves of cos and sin are equal, so that the operators may read the first half only, and because
    every channel of the section mix is one product of a position and a frequency. The tables stay in float32 when all
    their readers are fused rotations; with a reader left over, the model's own cast stays too.
    """

    name: ClassVar[str] = "fuse_rope"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for rewrite in self.rewrites(program.geometry):
            for name, region in program.regions.items():
                outcome.add(name, *apply(region.graph, rewrite))
        if outcome.sites:
            _drop_table_casts(program)
        return outcome

    def rewrites(self, geometry: Geometry) -> tuple[Rewrite, ...]:
        """Return the rewrites for a model of this geometry."""
        return tuple(rewrite for rotary in geometry.rotary for rewrite in _rewrites(rotary))


@cache
def _rewrites(rotary: Rotary) -> tuple[Rewrite, ...]:
    if rotary.shared:
        return tuple(_axial_rewrites(rotary))
    return tuple(_split_rewrites(rotary) if len(rotary.sections) == 2 else _mixed_rewrites(rotary))


def _axial_rewrites(rotary: Rotary) -> Iterator[Rewrite]:
    """Yield rewrites of axes with the same frequencies, which rotate packed `[patches, heads, head_dim]`, in
    float32."""
    half = rotary.head_dim // 2
    rows: dict[int, Any] = {0: Dim("rows")}
    table = torch.empty(6, rotary.head_dim, device="meta")
    states = torch.empty(6, 2, rotary.head_dim, dtype=COMPUTE_DTYPE, device="meta")
    yield Rewrite(_axial_rotation, _fused_rotation(half), (states, states, table, table), (rows, rows, rows, rows))
    positions = torch.empty(6, len(rotary.sections), dtype=torch.int64, device="meta")
    frequencies = torch.empty(rotary.sections[0], device="meta")
    yield Rewrite(_tables(rotary, _axial_parts(rotary)), _fused_tables(rotary, 1), (positions, frequencies), (rows, {}))


def _split_rewrites(rotary: Rotary) -> Iterator[Rewrite]:
    """Yield rewrites of two axes that split the frequencies, which rotate packed `[1, heads, patches, head_dim]`, in
    the compute dtype."""
    half = rotary.head_dim // 2
    rows: dict[int, Any] = {0: Dim("rows")}
    table = torch.empty(6, rotary.head_dim, dtype=COMPUTE_DTYPE, device="meta")
    states = torch.empty(1, 2, 6, rotary.head_dim, dtype=COMPUTE_DTYPE, device="meta")
    shapes = ({2: rows[0]}, {2: rows[0]}, rows, rows)
    yield Rewrite(_rotation(0), _fused_rotation(half, packed=True), (states, states, table, table), shapes)
    positions = torch.empty(6, len(rotary.sections), dtype=torch.int64, device="meta")
    frequencies = torch.empty(half, device="meta")
    yield Rewrite(_tables(rotary, _split_parts(rotary)), _fused_tables(rotary, 1), (positions, frequencies), (rows, {}))


def _mixed_rewrites(rotary: Rotary) -> Iterator[Rewrite]:
    """Yield rewrites of M-RoPE, and of RoPE with its single axis, on `[batch, heads, sequence, head_dim]` in the
    compute dtype."""
    half = rotary.head_dim // 2
    single = len(rotary.sections) == 1
    rows: dict[int, Any] = {0: Dim("batch"), 1: Dim("rows")}
    states_rows = {0: rows[0], 2: rows[1]}
    table = torch.empty(3, 6, rotary.head_dim, dtype=COMPUTE_DTYPE, device="meta")
    states = torch.empty(3, 2, 6, rotary.head_dim, dtype=COMPUTE_DTYPE, device="meta")
    shapes = (states_rows, states_rows, rows, rows)
    yield Rewrite(_rotation(1), _fused_rotation(half), (states, states, table, table), shapes)
    axes = () if single else (len(rotary.sections),)
    positions = torch.empty(*axes, 3, 6, dtype=torch.int64, device="meta")
    frequencies = torch.empty(half, device="meta")
    parts = _interleaved_parts(rotary) if rotary.interleaved else _mixed_parts(rotary)
    tables = _plain_tables(rotary) if single else _tables(rotary, parts)
    position_rows = rows if single else {1: rows[0], 2: rows[1]}
    yield Rewrite(tables, _fused_tables(rotary, None if single else 0), (positions, frequencies), (position_rows, {}))


def _rotate_half(states: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    return torch.cat((-states[..., half:], states[..., :half]), dim=-1)


def _rotation(heads: int) -> Callable[..., Any]:
    """Build the pattern of a rotation whose tables get a dimension at the axis of the heads."""

    def pattern(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
        return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin

    return pattern


def _axial_rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide_query, wide_key = query.float(), key.float()
    rotated_query = wide_query * cos + _rotate_half(wide_query) * sin
    rotated_key = wide_key * cos + _rotate_half(wide_key) * sin
    return rotated_query.to(query.dtype), rotated_key.to(key.dtype)


def _fused_rotation(half: int, packed: bool = False) -> Callable[..., Any]:
    def replacement(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        cos, sin = cos[..., :half], sin[..., :half]
        if packed:
            cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        return _OPS.mrope_rotate(query, key, cos, sin)

    return replacement


def _tables(rotary: Rotary, parts_of: Callable[[Tensor], list[Tensor]]) -> Callable[..., Any]:
    """Build the pattern of tables that are cut into the parts of the axes, side by side, twice."""

    def pattern(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * inv_freq

        def mix(table: Tensor) -> Tensor:
            parts = parts_of(table)
            half = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
            return torch.cat((half, half), dim=-1)

        return mix(angles.cos() * rotary.scaling), mix(angles.sin() * rotary.scaling)

    return pattern


def _axial_parts(rotary: Rotary) -> Callable[[Tensor], list[Tensor]]:
    return lambda table: [table[:, axis] for axis in range(len(rotary.sections))]


def _split_parts(rotary: Rotary) -> Callable[[Tensor], list[Tensor]]:
    # Sections are equal, or the pattern finds nothing.
    return lambda table: [part[:, axis] for axis, part in enumerate(table.chunk(len(rotary.sections), dim=-1))]


def _mixed_parts(rotary: Rotary) -> Callable[[Tensor], list[Tensor]]:
    return lambda table: [part[axis] for axis, part in enumerate(table.split(rotary.sections, dim=-1))]


def _interleaved_parts(rotary: Rotary) -> Callable[[Tensor], list[Tensor]]:
    return lambda table: [interleave(table, rotary.sections)]


def _plain_tables(rotary: Rotary) -> Callable[..., Any]:
    def pattern(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * inv_freq
        both = torch.cat((angles, angles), dim=-1)
        return both.cos() * rotary.scaling, both.sin() * rotary.scaling

    return pattern


def _fused_tables(rotary: Rotary, axis: int | None) -> Callable[..., Any]:
    """Build the replacement of a table pattern; `axis` is the position ids' dimension of axes, None if they have
    none."""

    def replacement(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        if axis is None:
            position_ids = position_ids.unsqueeze(0)
        elif axis:
            position_ids = position_ids.movedim(axis, 0)
        turns = (True,) if rotary.interleaved else ()
        cos, sin = _OPS.mrope_cos_sin(position_ids, inv_freq, rotary.sections, rotary.shared, rotary.scaling, *turns)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    return replacement


def _drop_table_casts(program: Program) -> None:
    """Pass tables between regions in float32 where every reader is a fused rotation."""
    for name, region in program.regions.items():
        results = region.results()
        casts = [
            (index, node)
            for index, node in enumerate(results)
            if node.target is aten.to.dtype and _is_table(node.args[0]) and len(node.users) == 1
        ]
        for index, node in casts:
            readers = _readers(program, name, index)
            if all(_reads_as_table(placeholder) for placeholder in readers):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                for placeholder in readers:
                    placeholder.meta["val"] = placeholder.meta["val"].float()


def _is_table(node: Any) -> bool:
    """Return whether a node is cat((t, t)) with a result t of `mrope_cos_sin`."""
    if not isinstance(node, Node) or node.target is not aten.cat.default:
        return False
    part = node.args[0][0]  # type: ignore[index]
    source = part.args[0] if isinstance(part, Node) and part.args else None
    return isinstance(source, Node) and source.target is _OPS.mrope_cos_sin.default


def _reads_as_table(placeholder: Node) -> bool:
    """Return whether only fused rotations read a placeholder, and only its first half."""
    halves = [user.target is aten.slice.Tensor for user in placeholder.users]
    readers = [reader for user in placeholder.users for reader in _past_unsqueeze(user)]
    return all(halves) and all(reader.target is _OPS.mrope_rotate.default for reader in readers)


def _past_unsqueeze(node: Node) -> list[Node]:
    return [
        reader for user in node.users for reader in (user.users if user.target is aten.unsqueeze.default else (user,))
    ]


def _readers(program: Program, name: str, index: int) -> list[Node]:
    """Return the placeholders, in any region, that a region's result at this index is passed to."""
    readers: dict[Node, None] = {}
    for variant in program.variants.values():
        values = {call.outputs[index] for call in variant.calls if call.region == name}
        for call in variant.calls:
            region = program.regions[call.region]
            activations = region.placeholders()[len(region.slots) :]
            for value, placeholder in zip(call.inputs, activations, strict=True):
                if value in values:
                    readers[placeholder] = None
    return list(readers)
