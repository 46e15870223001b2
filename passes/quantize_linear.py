"""Store the weights of linear layers in fewer bits, in bitsandbytes' layouts or a target's; there embeddings too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlmbuild.formats import WeightFormat
from vlmbuild.ir.linear_layers import LinearSite, embedding_sites, linear_sites
from vlmbuild.ir.program import Program, Region, Slot, WeightRecipe, join
from vlmbuild.ir.split_region import split_by
from vlmbuild.ops import EMBEDDING, PLAIN_LINEAR
from vlmbuild.quant.decide import Decision
from vlmbuild.quant.spec import QUANTIZE_PASS
from vlmbuild.rewrite.pass_manager import PassOutcome


@dataclass(frozen=True, slots=True)
class QuantizeLinear:
    """Replace linear layers by quantized ones, each by its decision (`vlmbuild.quant.decide`).

    Before: linear(x, weight, bias)                         weight: compute[out, in]
    After, 4 bits (QLoRA, arXiv:2305.14314, section 3):
            linear_4bit(x, weight, weight_absmax, weight_nested_absmax, weight_nested_offset, bias, in, out, ...)
                                                            weight: u8[out * in / 2, 1]
    After, 8 bits (LLM.int8, arXiv:2208.07339, section 3):
            linear_8bit(x, weight, weight_scb, bias, threshold)
                                                            weight: i8[out, in]
    After, for a target with operators of its own (`packed`):
            linear_packed(x, weight, bias, format)          weight: compute[out, in], dequantized
            embedding_packed(weight, indices, format)       for embedding(weight, indices)

    Not exact: values are rounded. A layer's inputs and outputs stay in the compute dtype. Where the instances of a region
    are not all to be quantized alike, the region is split.

    Attributes:
        decisions: Module name -> decision. Other linear layers keep their dtype, and so do embeddings whose decision does not
            hold for lookups.
        packed: Mark the layers only; the target stores their weights and has its own product.
    """

    decisions: Mapping[str, Decision]
    packed: bool = False

    name: ClassVar[str] = QUANTIZE_PASS
    exact: ClassVar[bool] = False

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for name in list(program.regions):
            region = program.regions[name]
            decided: dict[tuple[WeightFormat | None, ...], tuple[Decision, ...]] = {}

            def formats(instance: str) -> tuple[WeightFormat | None, ...]:
                decisions = self._decisions(region, instance)  # noqa: B023  called before the next iteration
                key = tuple(decision.format for decision in decisions)
                decided[key] = _merged(decided.get(key, decisions), decisions)  # noqa: B023
                return key

            for part, key in split_by(program, name, formats):
                outcome.add_part(part.name, name)
                self._rewrite(part, decided[key], outcome)
        return outcome

    def _decisions(self, region: Region, instance: str) -> tuple[Decision, ...]:
        """Return the decisions on an instance's linear layers and then on its lookups, in the order of their nodes."""
        sites = {site.node: site for site in linear_sites(region, (PLAIN_LINEAR,))}
        layers = (
            self.decisions.get(join(instance, sites[node].module), Decision(None, "nothing was decided"))
            if node in sites
            else Decision(None, "a product with a computed weight")
            for node in _linear_nodes(region)
        )
        return *layers, *(self._lookup(instance, site) for site in embedding_sites(region))

    def _lookup(self, instance: str, site: LinearSite) -> Decision:
        decision = self.decisions.get(join(instance, site.module))
        return decision if self.packed and decision is not None and decision.lookups else Decision(None)

    def _rewrite(self, region: Region, decisions: tuple[Decision, ...], outcome: PassOutcome) -> None:
        sites = {site.node: site for site in linear_sites(region, (PLAIN_LINEAR,))}
        lookups = {site.node: site for site in embedding_sites(region)}
        sites |= lookups
        for node, decision in zip([*_linear_nodes(region), *lookups], decisions, strict=True):
            site = sites.get(node)
            if node in lookups and decision == Decision(None):
                continue  # no lookup was decided about
            if site is None or decision.format is None:
                where = f"{site.module}: " if site is not None else ""
                outcome.add(region.name, 0, [where + decision.reason])
            else:
                (_mark if self.packed else _quantize)(region, node, site.slot, decision.format)
                outcome.add(region.name, 1)


def _merged(one: tuple[Decision, ...], other: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """Join the reasons of decisions on equal formats."""
    pairs = zip(one, other, strict=True)
    return tuple(
        a if b.reason in a.reason.split("; ") else replace(a, reason=f"{a.reason}; {b.reason}") for a, b in pairs
    )


def _linear_nodes(region: Region) -> list[Node]:
    return [node for node in region.graph.graph.nodes if node.target is PLAIN_LINEAR]


def _mark(region: Region, node: Node, slot: Slot, weight_format: WeightFormat) -> None:
    arguments: Any = node.args
    if node.target is EMBEDDING:
        node.target = torch.ops.vlmbuild.embedding_packed.default
        node.args = (*arguments[:2], weight_format.describe())
    else:
        bias = arguments[2] if len(arguments) > 2 else None
        node.target = torch.ops.vlmbuild.linear_packed.default
        node.args = (*arguments[:2], bias, weight_format.describe())
    region.recipes += (WeightRecipe(slot.name, slot.shape, weight_format),)


def _quantize(region: Region, node: Node, slot: Slot, weight_format: WeightFormat) -> None:
    arguments: Any = node.args
    values, weight = arguments[:2]
    bias = arguments[2] if len(arguments) > 2 else None
    stored = {
        suffix: region.add_slot(Slot(slot.name + suffix, shape, dtype, "buffer", slot.role))
        for suffix, (dtype, shape) in weight_format.buffers(slot.shape).items()
    }
    node.target, node.args = weight_format.call(slot.shape, values, stored, bias)
    region.remove_slot(weight)
    region.recipes += (WeightRecipe(slot.name, slot.shape, weight_format),)
