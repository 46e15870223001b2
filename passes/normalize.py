"""Drop leftovers of tracing (assertions, casts to the same dtype, products with one, dropout), and check the operators that
stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from vlmbuild.errors import CaptureError
from vlmbuild.ir.printer import target_name
from vlmbuild.ir.program import Program, Region
from vlmbuild.ir.serialize import OPERATORS
from vlmbuild.rewrite.pass_manager import PassOutcome
from vlmbuild.rewrite.simplify import simplify

_ALLOWED = OPERATORS.keys() | {"aten.chunk.default", "aten.slice_scatter.default"}
"""Operators that an artifact may hold, and two that only tables of positions use: `fuse_rope` replaces them."""


@dataclass(frozen=True, slots=True)
class Normalize:
    """Bring every region into the form that patterns are written for.

    Before:                                     After:
        _assert_tensor_metadata(x, ...)
        y = to.dtype(x, compute)  # x is so         z = cos(x)
        z = mul(cos(y), 1.0)

    Legal because each removed node returns its input unchanged, or nothing. A captured operator that an artifact may not
    hold raises CaptureError here, before any work on weights.
    """

    name: ClassVar[str] = "normalize"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for name, region in program.regions.items():
            outcome.add(name, simplify(region.graph))
            _check_operators(region)
        return outcome


def _check_operators(region: Region) -> None:
    for node in region.graph.graph.nodes:
        name = target_name(node)
        if node.op == "call_function" and name not in _ALLOWED:
            operator = ".".join(name.split(".")[:2])
            others = sorted(allowed for allowed in _ALLOWED if allowed.startswith(f"{operator}."))
            known = f"{', '.join(others)} alone" if others else "the operators of known models alone"
            raise CaptureError(
                f"Region {region.name} of the model calls {name}{_traced_in(node)}, which no artifact may hold: loading "
                f"allows {known}. Install a transformers version of the tested range; if that fails too, report it with the "
                "config.json. In a family of your own, compute it on the host in `prepare`, or by allowed operators "
                "(vlmbuild/ir/serialize.py)."
            )


def _traced_in(node: Node) -> str:
    """Name the innermost module whose code called the operator, and its class."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    if not stack:
        return ""
    path, kind = stack[-1]
    module = path.removeprefix("L['self']").strip(".") or "the traced module"
    return f" in {module} ({str(getattr(kind, '__name__', kind)).rpartition('.')[2]})"
