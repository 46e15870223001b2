"""Lets a compiler see the Triton kernels that an operator launches on a GPU, as `torch.library.triton_op` does.

An operator of Python is opaque: inductor calls it, and AOTInductor has to keep Python for it. Where inductor compiles a graph
for a GPU, the operator's launches take its place. `triton_op` itself would make them the operator's code on every device.

Only launches that say everything can be shown. Inductor compiles a shown kernel with its own options, so one that must not
fuse products and sums stays opaque (rotation: `enable_fp_fusion`), or its bits would change. And what
a launcher asks of a size becomes a condition of the compiled graph: a layer that takes another kernel for few rows would be
compiled again for other batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch._library.triton import triton_ops_to_kernels
from torch._subclasses.functional_tensor import FunctionalTensorMode


def show_launches(operator: Any, launch: Callable[..., Any], shown: Callable[..., bool]) -> None:
    """Trace through the launches of a custom operator where its arguments allow it.

    Args:
        operator: From `torch.library.custom_op`.
        launch: Function that launches, made of operators of torch and of `vlmbuild.ops.triton_util.Launch`.
        shown: Predicate: the launches for these arguments can be shown.
    """

    def trace(mode: Any, overload: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled() or not shown(*args):  # an exported graph keeps the operator
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode:
            return launch(*args)

    operator.register_torch_dispatch(FunctionalTensorMode, trace)


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Kernels that are imported on first use: importing an operator must not import triton."""

    load: Callable[[], list[Any]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.load())


def name_kernels(operator: str, load: Callable[[], list[Any]]) -> None:
    """Make torch's cache of compiled graphs depend on the source of the kernels that calls of an operator show."""
    triton_ops_to_kernels[operator] = _Kernels(load)  # type: ignore[assignment]
