"""Store the weights of linear layers in fewer bits, in bitsandbytes' layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar

import torch
from torch.fx import Node

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.formats import NESTED_BLOCKSIZE, EightBit, FourBit, WeightFormat
from vlmbuild.ir.program import COMPUTE_DTYPE, Program, Region, Slot, WeightRecipe, join
from vlmbuild.ir.split_region import divide_by
from vlmbuild.quant.decide import LINEAR, QUANTIZE, Decision, weight_slot
from vlmbuild.rewrite.pass_manager import PassOutcome


@dataclass(frozen=True, slots=True)
class QuantizeLinear:
    """Replace linear layers by quantized ones, as decided for each (`vlmbuild.quant.decide`).

    Before: linear(x, weight, bias)                         weight: compute[out, in]
    After, 4 bits (QLoRA, arXiv:2305.14314, section 3):
            linear_4bit(x, weight, weight_absmax, weight_nested_absmax, weight_nested_offset, bias, in, out, ...)
                                                            weight: u8[out * in / 2, 1]
    After, 8 bits (LLM.int8, arXiv:2208.07339, section 3):
            linear_8bit(x, weight, weight_scb, bias, threshold)
                                                            weight: i8[out, in]
    After, for a target with operators of its own (`packed`):
            linear_packed(x, weight, bias, format)          weight: compute[out, in], what the stored one stands for

    Not exact: values are rounded. A layer's inputs and outputs stay in the compute dtype. Where the instances of a region
    are not all to be quantized alike, the region is divided.

    Attributes:
        decisions: Module name -> decision. Linear layers that are not in it keep their dtype.
        packed: Only mark the layers; the target stores their weights and multiplies by them.
    """

    decisions: Mapping[str, Decision]
    packed: bool = False

    name: ClassVar[str] = QUANTIZE
    exact: ClassVar[bool] = False

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for name in list(program.regions):
            region = program.regions[name]
            decided: dict[tuple[WeightFormat | None, ...], tuple[Decision, ...]] = {}

            def formats(instance: str) -> tuple[WeightFormat | None, ...]:
                decisions = self._decisions(region, instance)  # noqa: B023  called before the next turn
                key = tuple(decision.format for decision in decisions)
                decided[key] = _merged(decided.get(key, decisions), decisions)  # noqa: B023
                return key

            for part, key in divide_by(program, name, formats):
                outcome.add_part(part.name, name)
                self._rewrite(part, decided[key], outcome)
        return outcome

    def _decisions(self, region: Region, instance: str) -> tuple[Decision, ...]:
        """For the linear layers of an instance, in the order of their nodes."""
        found = []
        for node in _linear_nodes(region):
            slot = weight_slot(region, node)
            if slot is None:
                found.append(Decision(None, "a product with a computed weight"))
            else:
                module = join(instance, slot.name.removesuffix(".weight"))
                found.append(self.decisions.get(module, Decision(None, "nothing was decided")))
        return tuple(found)

    def _rewrite(self, region: Region, decisions: tuple[Decision, ...], outcome: PassOutcome) -> None:
        for node, decision in zip(_linear_nodes(region), decisions, strict=True):
            slot = weight_slot(region, node)
            if slot is None or decision.format is None:
                place = f"{slot.name.removesuffix('.weight')}: " if slot is not None else ""
                outcome.add(region.name, 0, [place + decision.reason])
            else:
                (_mark if self.packed else _quantize)(region, node, slot, decision.format)
                outcome.add(region.name, 1)


def _merged(one: tuple[Decision, ...], other: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """Decisions on equal formats, with all reasons."""
    pairs = zip(one, other, strict=True)
    return tuple(
        a if b.reason in a.reason.split("; ") else replace(a, reason=f"{a.reason}; {b.reason}") for a, b in pairs
    )


def _linear_nodes(region: Region) -> list[Node]:
    return [node for node in region.graph.graph.nodes if node.target is LINEAR]


def _mark(region: Region, node: Node, slot: Slot, weight_format: WeightFormat) -> None:
    arguments: Any = node.args
    bias = arguments[2] if len(arguments) > 2 else None
    node.target = torch.ops.vlmbuild.linear_packed.default
    node.args = (*arguments[:2], bias, weight_format.describe())
    region.recipes += (WeightRecipe(slot.name, slot.shape, weight_format),)


def _quantize(region: Region, node: Node, slot: Slot, weight_format: WeightFormat) -> None:
    arguments: Any = node.args
    values, weight = arguments[:2]
    bias = arguments[2] if len(arguments) > 2 else None
    out_features, in_features = slot.shape
    if isinstance(weight_format, FourBit):
        stored = {suffix: region.add_slot(new) for suffix, new in _four_bit_slots(slot, weight_format).items()}
        tensors = (stored["weight"], stored["absmax"], stored.get("nested_absmax"), stored.get("nested_offset"))
        geometry = (in_features, out_features, weight_format.blocksize, weight_format.name, COMPUTE_DTYPE)
        node.target, node.args = torch.ops.vlmbuild.linear_4bit.default, (values, *tensors, bias, *geometry)
    else:
        assert isinstance(weight_format, EightBit)  # other formats are for targets that only want a mark
        stored = {suffix: region.add_slot(new) for suffix, new in _eight_bit_slots(slot, weight_format).items()}
        node.target = torch.ops.vlmbuild.linear_8bit.default
        node.args = (values, stored["weight"], stored["scb"], bias, weight_format.threshold)
    region.remove_slot(weight)
    region.recipes += (WeightRecipe(slot.name, slot.shape, weight_format),)


def _four_bit_slots(slot: Slot, weight_format: FourBit) -> dict[str, Slot]:
    count = slot.shape[0] * slot.shape[1]
    blocks = ceil(count / weight_format.blocksize)
    slots = {"weight": _buffer(slot, "", (ceil(count / 2), 1), torch.uint8)}
    if not weight_format.double_quant:
        return slots | {"absmax": _buffer(slot, "_absmax", (blocks,), torch.float32)}
    return slots | {
        "absmax": _buffer(slot, "_absmax", (blocks,), torch.uint8),
        "nested_absmax": _buffer(slot, "_nested_absmax", (ceil(blocks / NESTED_BLOCKSIZE),), torch.float32),
        "nested_offset": _buffer(slot, "_nested_offset", (), torch.float32),
    }


def _eight_bit_slots(slot: Slot, _: EightBit) -> dict[str, Slot]:
    return {
        "weight": _buffer(slot, "", slot.shape, torch.int8),
        "scb": _buffer(slot, "_scb", slot.shape[:1], torch.float32),
    }


def _buffer(slot: Slot, suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
    return Slot(slot.name + suffix, shape, dtype, "buffer", slot.role)
