"""Regional compilation under a plain `torch.compile(model)`: only the regions' graphs are compiled, each once.

`torch.compile` works by a per-thread callback that sees every Python frame. `swap_compiler` removes the caller's callback, so
that the host prologue and the loop over regions run uncompiled, and `apply` restores it around a region's graph. The same
callback serves when gradient checkpointing calls the region again from backward, where no callback is set. Only this module
touches it; it is private to torch (checked for 2.11 to 2.13), and no public function returns the backend and options that
`torch.compile` was called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame

from vlmbuild.ir.dims import Dim, Shape

Compiler = Any
"""Callback of the surrounding `torch.compile`, or None."""

swap_compiler: Callable[[Compiler], Compiler] = set_eval_frame
"""Set the callback and return the previous one: `compiler = swap_compiler(None)`, later `swap_compiler(compiler)`."""


def apply(
    compiler: Compiler, function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Call a graph's forward under the compiler; None calls it uncompiled."""
    if compiler is None:
        return function(*tensors)
    previous = set_eval_frame(compiler)
    try:
        return function(*tensors)
    finally:
        set_eval_frame(previous)


def mark_dynamic(tensor: Tensor, shape: Shape) -> None:
    """Mark sizes that change from batch to batch, so that the first trace serves all."""
    for axis, size in enumerate(shape):
        if isinstance(size, Dim):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
