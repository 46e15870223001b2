"""Add low-rank adapters to linear layers, plain or quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.adapters.lora import Lora
from vlmbuild.ir.linear_layers import LinearSite, linear_sites
from vlmbuild.ir.program import Program, Region, Role, Slot, join
from vlmbuild.ir.split_region import split_by
from vlmbuild.rewrite.pass_manager import PassOutcome

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class AddLora:
    """Add LoRA (arXiv:2106.09685, section 4.1) to the named linear layers.

    Before: y = linear(x, weight, bias)
    After:  y = lora(linear(x, weight, bias), dropout(to(x, float32)), lora_A, lora_B, scaling)     # without dropout: x

    `lora_A` and `lora_B` are trainable and in float32; their product starts at zero, so the result is unchanged until they
    are trained. Names and shapes are PEFT's. Where the instances of a region are not all to be adapted alike, the region is
    split.

    Attributes:
        adapters: Module name -> its adapter.
    """

    adapters: Mapping[str, Lora]

    name: ClassVar[str] = "add_lora"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for name in list(program.regions):
            modules = [site.module for site in linear_sites(program.regions[name])]

            def adapters(instance: str) -> tuple[Lora | None, ...]:
                return tuple(self.adapters.get(join(instance, module)) for module in modules)  # noqa: B023

            for part, chosen in split_by(program, name, adapters):
                outcome.add_part(part.name, name)
                _rewrite(part, chosen, outcome)
        return outcome


def _rewrite(region: Region, adapters: tuple[Lora | None, ...], outcome: PassOutcome) -> None:
    names = {slot.name for slot in region.slots}
    for site, lora in zip(linear_sites(region), adapters, strict=True):
        if lora is None:
            continue
        if f"{site.module}.lora_A.default.weight" in names:
            outcome.add(region.name, 0, [f"{site.module}: has an adapter already"])
            continue
        _add(region, site, lora)
        outcome.add(region.name, 1)


def _add(region: Region, site: LinearSite, lora: Lora) -> None:
    out_features, in_features = site.shape
    node, role = site.node, site.slot.role
    down = region.add_slot(_adapter(f"{site.module}.lora_A.default.weight", (lora.r, in_features), role))
    up = region.add_slot(_adapter(f"{site.module}.lora_B.default.weight", (out_features, lora.r), role))
    graph = region.graph.graph
    values = node.args[0]
    with graph.inserting_before(node):
        if lora.dropout:
            values = graph.call_function(aten.to.dtype, (values, torch.float32))
            values = graph.call_function(aten.dropout.default, (values, lora.dropout, True))
    with graph.inserting_after(node):
        adapted = graph.call_function(torch.ops.vlmbuild.lora.default, (node, values, down, up, lora.scaling))
    node.replace_all_uses_with(adapted, delete_user_cb=lambda user: user is not adapted)


def _adapter(name: str, shape: tuple[int, int], role: Role) -> Slot:
    return Slot(name, shape, torch.float32, "parameter", role)
