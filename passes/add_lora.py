"""Add low-rank adapters to linear layers, plain or quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from vlmbuild.divide import divide_by
from vlmbuild.lora import Lora, linear_features, linear_nodes
from vlmbuild.pipeline import PassOutcome
from vlmbuild.program import COMPUTE_DTYPE, Program, Region, Role, Slot, join

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class AddLora:
    """LoRA (arXiv:2106.09685, section 4.1) on the linear layers that are named.

    Before: y = linear(x, weight, bias)
    After:  y = to(linear(x, weight, bias) + scaling * linear(linear(dropout(to(x, float32)), lora_A), lora_B), compute)

    `lora_A` and `lora_B` are trainable and in float32; their product starts at zero, so the result is unchanged until they
    are trained. Names and shapes are PEFT's. Layers that read one value share its cast. Where the instances of a region are
    not all to be adapted alike, the region is divided.

    Attributes:
        adapters: Module name -> its adapter.
    """

    adapters: Mapping[str, Lora]

    name: ClassVar[str] = "add_lora"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for name in list(program.regions):
            modules = [slot.name.removesuffix(".weight") for _, slot in linear_nodes(program.regions[name])]

            def adapters(instance: str) -> tuple[Lora | None, ...]:
                return tuple(self.adapters.get(join(instance, module)) for module in modules)  # noqa: B023

            for part, chosen in divide_by(program, name, adapters):
                outcome.add_part(part.name, name)
                _rewrite(part, chosen, outcome)
        return outcome


def _rewrite(region: Region, adapters: tuple[Lora | None, ...], outcome: PassOutcome) -> None:
    names = {slot.name for slot in region.slots}
    wide: dict[Node, Node] = {}
    for (node, slot), lora in zip(linear_nodes(region), adapters, strict=True):
        module = slot.name.removesuffix(".weight")
        if lora is None:
            continue
        if f"{module}.lora_A.default.weight" in names:
            outcome.add(region.name, 0, [f"{module}: has an adapter already"])
            continue
        _add(region, node, module, slot.role, lora, wide)
        outcome.add(region.name, 1)


def _add(region: Region, node: Node, module: str, role: Role, lora: Lora, wide: dict[Node, Node]) -> None:
    """`wide` has the float32 casts of inputs so far."""
    out_features, in_features = linear_features(region, node)
    down = region.add_slot(_adapter(f"{module}.lora_A.default.weight", (lora.r, in_features), role))
    up = region.add_slot(_adapter(f"{module}.lora_B.default.weight", (out_features, lora.r), role))
    graph = region.graph.graph
    (values,) = (argument for argument in node.args[:1] if isinstance(argument, Node))
    if values not in wide:
        with graph.inserting_before(node):
            wide[values] = graph.call_function(aten.to.dtype, (values, torch.float32))
    with graph.inserting_after(node):
        # Built from the end, so that each new node lands right behind the layer.
        result = graph.call_function(aten.to.dtype, (node, COMPUTE_DTYPE))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    with graph.inserting_before(result):
        low = wide[values]
        if lora.dropout:
            low = graph.call_function(aten.dropout.default, (low, lora.dropout, True))
        low = graph.call_function(aten.linear.default, (low, down))
        high = graph.call_function(aten.linear.default, (low, up))
        scaled = graph.call_function(aten.mul.Tensor, (high, lora.scaling))
        total = graph.call_function(aten.add.Tensor, (node, scaled))
    result.args = (total, COMPUTE_DTYPE)


def _adapter(name: str, shape: tuple[int, int], role: Role) -> Slot:
    return Slot(name, shape, torch.float32, "parameter", role)
