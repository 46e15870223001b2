"""Make weights trainable beside an adapter: embeddings, a head, a projector, norms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Node

from vlmbuild.ir.program import COMPUTE_DTYPE, Program, Region, join
from vlmbuild.ir.split_region import split_by
from vlmbuild.rewrite.pass_manager import PassOutcome

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class TrainWeights:
    """Keep the named parameters in float32, so that small updates are not lost to rounding, and cast them where they are read.

    Before: y = linear(x, weight)                       weight: compute[out, in]
    After:  y = linear(x, to(weight, compute))          weight: f32[out, in]

    Before: y = embedding(weight, ids)
    After:  y = to(embedding(weight, ids), compute)     # casts the rows that are read, not the table

    Legal because the cast gives the same values as before.

    Attributes:
        names: Names of parameters, "lm_head.weight".
    """

    names: frozenset[str]

    name: ClassVar[str] = "train_weights"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for name in list(program.regions):
            slots = program.regions[name].slots

            def named(instance: str) -> tuple[bool, ...]:
                return tuple(join(instance, slot.name) in self.names for slot in slots)  # noqa: B023

            for part, chosen in split_by(program, name, named):
                outcome.add_part(part.name, name)
                outcome.add(part.name, sum(_widen(part, index) for index, is_named in enumerate(chosen) if is_named))
        return outcome


def _widen(region: Region, index: int) -> bool:
    """Store the slot at an index in float32; returns whether it was not before."""
    slot, node = region.slots[index], region.placeholders()[index]
    if slot.kind != "parameter" or slot.dtype != COMPUTE_DTYPE:
        return False
    region.slots = (*region.slots[:index], replace(slot, dtype=torch.float32), *region.slots[index + 1 :])
    if "val" in node.meta:
        node.meta["val"] = node.meta["val"].float()
    graph = region.graph.graph
    for reader in list(node.users):
        if reader.target is aten.embedding.default:
            _cast_result(region, reader)
        else:
            with graph.inserting_before(reader):
                reader.replace_input_with(node, graph.call_function(aten.to.dtype, (node, COMPUTE_DTYPE)))
    return True


def _cast_result(region: Region, node: Node) -> None:
    graph = region.graph.graph
    with graph.inserting_after(node):
        cast = graph.call_function(aten.to.dtype, (node, COMPUTE_DTYPE))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
