"""Drop what tracing left behind: assertions, casts to the same dtype, products with one, unused values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmbuild.ir.program import Program
from vlmbuild.rewrite.pass_manager import PassOutcome
from vlmbuild.rewrite.simplify import simplify


@dataclass(frozen=True, slots=True)
class Normalize:
    """Bring every region into the form that patterns are written for.

    Before:                                     After:
        _assert_tensor_metadata(x, ...)
        y = to.dtype(x, compute)  # x is so         z = cos(x)
        z = mul(cos(y), 1.0)

    Legal because each removed node returns its input unchanged, or nothing.
    """

    name: ClassVar[str] = "normalize"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for name, region in program.regions.items():
            outcome.add(name, simplify(region.graph))
        return outcome
