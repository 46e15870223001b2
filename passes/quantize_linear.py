"""Quantize the language model's linear layers to 4 bits, in bitsandbytes' layout."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from typing import Any, ClassVar

import torch
from torch.fx import Node

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.errors import UsageError
from vlmbuild.pipeline import PassOutcome
from vlmbuild.program import COMPUTE_DTYPE, Program, Region, Slot, WeightRecipe, join
from vlmbuild.recipe import QuantSpec

_NESTED_BLOCKSIZE = 256
_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True, slots=True)
class QuantizeLinear:
    """Replace linear layers whose weight has the role "language" (QLoRA, arXiv:2305.14314, section 3).

    Before: linear(x, weight, bias)                         weight: compute[out, in]
    After:  linear_4bit(x, weight, weight_absmax, weight_nested_absmax, weight_nested_offset, bias, in, out, ...)
                                                            weight: u8[out * in / 2, 1]

    Not exact: values are rounded. Head, embedding, projector and vision tower keep their dtype: rounding them costs small
    models more accuracy than it saves memory. A layer's inputs and outputs stay in the compute dtype.

    Attributes:
        spec: Format, block size, double quantization, and further modules to skip.
    """

    spec: QuantSpec

    name: ClassVar[str] = "quantize_linear"
    exact: ClassVar[bool] = False

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        unmatched = set(self.spec.skip)
        for name, region in program.regions.items():
            slots = region.slot_nodes()
            for node in [node for node in region.graph.graph.nodes if node.target is _LINEAR]:
                weight: Any = node.args[1]
                reason = self._refusal(region, slots.get(weight), weight, unmatched)
                if reason:
                    outcome.add(name, 0, [reason])
                else:
                    self._quantize(region, node, slots[weight])
                    outcome.add(name, 1)
        if unmatched:
            raise UsageError(
                f"The skip pattern {min(unmatched)!r} matches no linear layer. Patterns match module names, for example "
                "'*.self_attn.o_proj'."
            )
        return outcome

    def _refusal(self, region: Region, slot: Slot | None, weight: Node, unmatched: set[str]) -> str | None:
        if slot is None or not slot.name.endswith(".weight"):
            return "a product with a computed weight"
        module = slot.name.removesuffix(".weight")
        skipped = [self._skips(join(instance, module), unmatched) for instance in region.instances]
        if slot.role != "language":
            return f"{module}: role {slot.role} keeps its dtype"
        if any(skipped) and not all(skipped):
            raise UsageError(
                f"A skip pattern matches {module} in some layers of {region.name} and not in others; equal layers share "
                "one graph and are quantized alike. Use a pattern that matches all of them."
            )
        if any(skipped):
            return f"{module}: in the skip list"
        return f"{module}: its weight is used elsewhere too" if len(weight.users) > 1 else None

    def _skips(self, module: str, unmatched: set[str]) -> bool:
        hits = [pattern for pattern in self.spec.skip if fnmatchcase(module, pattern)]
        unmatched.difference_update(hits)
        return bool(hits)

    def _quantize(self, region: Region, node: Node, slot: Slot) -> None:
        out_features, in_features = slot.shape
        arguments: Any = node.args
        values, weight = arguments[:2]
        bias = node.args[2] if len(node.args) > 2 else None
        stored = {suffix: region.add_slot(new) for suffix, new in self._stored_slots(slot).items()}
        geometry: tuple[Any, ...] = (in_features, out_features, self.spec.blocksize, self.spec.format, COMPUTE_DTYPE)
        tensors = (stored["weight"], stored["absmax"], stored.get("nested_absmax"), stored.get("nested_offset"))
        node.target, node.args = torch.ops.vlmbuild.linear_4bit.default, (values, *tensors, bias, *geometry)
        region.remove_slot(weight)
        recipe = WeightRecipe(slot.name, slot.shape, self.spec.format, self.spec.blocksize, self.spec.double_quant)
        region.recipes += (recipe,)

    def _stored_slots(self, slot: Slot) -> dict[str, Slot]:
        count = slot.shape[0] * slot.shape[1]
        blocks = ceil(count / self.spec.blocksize)

        def buffer(suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
            return Slot(slot.name + suffix, shape, dtype, "buffer", slot.role)

        slots = {"weight": buffer("", (ceil(count / 2), 1), torch.uint8)}
        if not self.spec.double_quant:
            return slots | {"absmax": buffer("_absmax", (blocks,), torch.float32)}
        return slots | {
            "absmax": buffer("_absmax", (blocks,), torch.uint8),
            "nested_absmax": buffer("_nested_absmax", (ceil(blocks / _NESTED_BLOCKSIZE),), torch.float32),
            "nested_offset": buffer("_nested_offset", (), torch.float32),
        }
