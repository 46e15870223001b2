"""Regional compilation under a plain `torch.compile(model)`: only the regions' graphs are compiled, each once.

`torch.compile` works by a per-thread callback that sees every Python frame. `suspend` takes the caller's callback away, so
that the host prologue and the loop over regions run as they are, and `apply` puts it back around a region's graph. The
same callback serves when gradient checkpointing calls the region again from backward, where no callback is set. This is
the only module that touches it; it is private to torch (checked for 2.11 to 2.13), and there is no public way to know the
backend and options that `torch.compile` was called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_shapes
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame

Compiler = Any
"""The callback of the surrounding `torch.compile`; None when there is none."""

suspend: Callable[[Compiler], Compiler] = set_eval_frame
"""Set the callback, return the previous one: `compiler = suspend(None)`, and `suspend(compiler)` to restore it."""


def apply(
    compiler: Compiler, function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], dynamic: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Call a graph under the compiler.

    Args:
        compiler: From `suspend`; None calls it as it is.
        function: The graph's forward.
        tensors: Its arguments.
        dynamic: Those whose sizes change from call to call. All their dimensions become symbols, down to size one
            (`backed_size_oblivious`: a batch or image count of one is no special case); a size that the graph itself
            fixes is fixed by the trace.
    """
    if compiler is None:
        return function(*tensors)
    for tensor in dynamic:
        for axis in range(tensor.dim()):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
    with symbolic_shapes.patch(backed_size_oblivious=True):
        previous = set_eval_frame(compiler)
        try:
            return function(*tensors)
        finally:
            set_eval_frame(previous)
