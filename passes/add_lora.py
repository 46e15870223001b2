"""Add low-rank adapters to linear layers, plain or quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.pipeline import PassOutcome
from vlmbuild.program import COMPUTE_DTYPE, Program, Region, Role, Slot, join

aten = torch.ops.aten
_PLAIN, _FOUR_BIT = aten.linear.default, torch.ops.vlmbuild.linear_4bit.default
_LINEAR = (_PLAIN, _FOUR_BIT, torch.ops.vlmbuild.linear_8bit.default)


@dataclass(frozen=True, slots=True)
class AddLora:
    """LoRA (arXiv:2106.09685, section 4.1) on every linear layer of the given roles.

    Before: y = linear(x, weight, bias)
    After:  y = to(linear(x, weight, bias) + scaling * linear(linear(x, lora_A), lora_B), compute)

    `lora_A` and `lora_B` are trainable and in float32; their product starts at zero, so the result is unchanged until they
    are trained. Names and shapes are PEFT's.

    Attributes:
        r: Rank.
        alpha: `scaling` is alpha / r.
        roles: Which linear layers.
        modules: Names of modules; when given, a layer is adapted if it has one of them in some instance.
    """

    r: int
    alpha: float
    roles: tuple[Role, ...] = ("language",)
    modules: frozenset[str] | None = None

    name: ClassVar[str] = "add_lora"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for name, region in program.regions.items():
            slots = region.slot_nodes()
            names = {slot.name for slot in region.slots}
            for node in [node for node in region.graph.graph.nodes if node.target in _LINEAR]:
                slot = slots.get(node.args[1])
                if slot is None or slot.role not in self.roles or ".lora_" in slot.name:
                    continue
                module = slot.name.removesuffix(".weight")
                if not self._is_named(region, module):
                    continue
                if f"{module}.lora_A.default.weight" in names:
                    outcome.add(name, 0, [f"{module}: has an adapter already"])
                    continue
                self._add(region, node, module, slot.role)
                outcome.add(name, 1)
        return outcome

    def _is_named(self, region: Region, module: str) -> bool:
        return self.modules is None or any(join(instance, module) in self.modules for instance in region.instances)

    def _add(self, region: Region, node: Node, module: str, role: Role) -> None:
        out_features, in_features = _features(region, node)
        down = region.add_slot(_adapter(f"{module}.lora_A.default.weight", (self.r, in_features), role))
        up = region.add_slot(_adapter(f"{module}.lora_B.default.weight", (out_features, self.r), role))
        graph = region.graph.graph
        with graph.inserting_after(node):
            # Built from the end, so that each new node lands right behind the layer.
            result = graph.call_function(aten.to.dtype, (node, COMPUTE_DTYPE))
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        with graph.inserting_before(result):
            wide = graph.call_function(aten.to.dtype, (node.args[0], torch.float32))
            low = graph.call_function(aten.linear.default, (wide, down))
            high = graph.call_function(aten.linear.default, (low, up))
            scaled = graph.call_function(aten.mul.Tensor, (high, self.alpha / self.r))
            total = graph.call_function(aten.add.Tensor, (node, scaled))
        result.args = (total, COMPUTE_DTYPE)


def _features(region: Region, node: Node) -> tuple[int, int]:
    """(out, in) of a linear layer; a loaded graph has no shapes, so they come from the weight or the arguments."""
    if node.target is _FOUR_BIT:
        in_features, out_features = node.args[6:8]
        return int(out_features), int(in_features)  # type: ignore[arg-type]
    out_features, in_features = region.slot_nodes()[node.args[1]].shape  # type: ignore[index]
    return out_features, in_features


def _adapter(name: str, shape: tuple[int, int], role: Role) -> Slot:
    return Slot(name, shape, torch.float32, "parameter", role)
