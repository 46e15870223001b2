"""The row type of `vlmbuild.ops.OPERATORS`: the facts about an operator that do not depend on a target."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlmbuild.ops.workspace import Workspace

if TYPE_CHECKING:
    from vlmbuild.ops.triton_util import Launch

Kind = Literal["attention", "linear", "embedding", "adapter", "rotary", "loss"]


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator.

    Attributes:
        name: Name in `torch.ops.vlmbuild`.
        kind: Kind of computation.
        part: "forward" and "backward" are the halves of a whole operator, which gradients and compilers see.
        in_programs: True if a stored program may call it.
        workspace: Formula of the bytes that a call needs beyond arguments and result; None where it needs nothing.
        kernels: Module with a function `launches(arguments, target, backward)`, for operators with Triton kernels.
    """

    name: str
    kind: Kind
    part: Literal["whole", "forward", "backward"] = "whole"
    in_programs: bool = True
    workspace: Workspace | None = None
    kernels: str | None = None

    @property
    def overload(self) -> Any:
        """The operator as it occurs in graphs."""
        return getattr(torch.ops.vlmbuild, self.name).default

    def launches(self, arguments: tuple[Any, ...], target: int, *, backward: bool = True) -> tuple[Launch, ...]:
        """Return the Triton launches of a call on a GPU, in order; needs triton where `kernels` is set.

        Args:
            arguments: The operator's arguments; tensors need no data.
            target: Compute capability, 90 for sm_90.
            backward: True to add the gradients' launches.
        """
        if self.kernels is None:
            return ()
        launches: tuple[Launch, ...] = import_module(self.kernels).launches(arguments, target, backward)
        return launches
