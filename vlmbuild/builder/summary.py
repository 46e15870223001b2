"""Summary of a model: regions, and parameters and bytes by role."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from vlmbuild.ir.schema import Role
from vlmbuild.quant.spec import QUANTIZE_PASS

if TYPE_CHECKING:
    from vlmbuild.ir.program import Program


@dataclass(frozen=True, slots=True)
class WeightSummary:
    """A source tensor in an artifact: its module name, role, stored bytes, and description of a quantized one's format."""

    name: str
    role: Role
    parameters: int
    nbytes: int
    format: str | None


def describe_regions(program: Program) -> list[dict[str, Any]]:
    """List every region with its instances, operators and parameters of one instance."""
    return [
        {
            "name": region.name,
            "instances": len(region.instances),
            "operators": sum(node.op == "call_function" for node in region.graph.graph.nodes),
            "parameters": sum(math.prod(weight.shape) for weight in region.source_weights()),
        }
        for region in program.regions.values()
    ]


def describe_roles(weights: Iterable[WeightSummary], refusals: dict[Role, list[str]]) -> list[dict[str, Any]]:
    """List every role with its parameters and bytes, parameters by format, and reasons of unquantized ones."""
    weights = list(weights)
    described = []
    for role in get_args(Role):
        mine = [weight for weight in weights if weight.role == role]
        if mine:
            parameters = sum(weight.parameters for weight in mine)
            formats: Counter[str] = Counter()
            for weight in mine:
                if weight.format is not None:
                    formats[weight.format] += weight.parameters
            quantized = sum(formats.values())
            reasons = list(dict.fromkeys(refusals.get(role, []))) + (["norms and biases"] if quantized else [])
            described.append(
                {
                    "role": role,
                    "parameters": parameters,
                    "quantized": quantized,
                    "formats": dict(formats.most_common()),
                    "bytes": sum(weight.nbytes for weight in mine),
                    "kept": reasons if quantized < parameters else [],
                }
            )
    return described


def refusals_by_role(
    roles: Mapping[tuple[str, str], Role], passes: Iterable[Mapping[str, Any]]
) -> dict[Role, list[str]]:
    """Collect why linear layers were not quantized.

    Args:
        roles: (region, slot) -> role.
        passes: Records of passes.
    """
    reasons: dict[Role, list[str]] = {}
    for record in passes:
        for refusal in record["refusals"] if record["name"] == QUANTIZE_PASS else ():
            region, _, rest = refusal.partition(": ")
            module, _, reason = rest.partition(": ")
            role = roles.get((region, f"{module}.weight"))
            if role is not None:
                reasons.setdefault(role, []).append(reason)
    return reasons


def slot_roles(program: Program) -> dict[tuple[str, str], Role]:
    """Return the role of each (region, slot)."""
    return {(region.name, slot.name): slot.role for region in program.regions.values() for slot in region.slots}
