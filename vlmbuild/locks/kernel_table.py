"""The kernel table of a lock: every Triton kernel that a program launches, compiled for GPUs that are not there.

Each operator names its launches for a call (`vlmbuild.ops.operator.Operator`): training, forward and backward, and attention
on a key-value cache, whose mask replaces the bounds of samples. Sizes that change from batch to batch are primes, so that no
kernel is compiled for a divisible size.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vlmbuild.ir.program import Program, Region
from vlmbuild.kv_cache.block import self_attention
from vlmbuild.locks.document import KernelRow, Kernels, LockedKernel
from vlmbuild.locks.kernel_compile import OPTIONS, compile_launch, meaning, specialize
from vlmbuild.ops import OPERATORS, Operator
from vlmbuild.util.cpu import available_cores

if TYPE_CHECKING:
    from vlmbuild.ops.triton_util import Launch

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100, B200."""
_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033)
"""Sizes of a program's dimensions."""
_WITH_KERNELS = {row.overload: row for row in OPERATORS.values() if row.kernels is not None and row.in_programs}
_compiled: dict[tuple[Any, ...], KernelRow] = {}


def kernel_table(program: Program, dtype: torch.dtype) -> Kernels:
    """Compile every kernel that a finished program launches, in each configuration, for every target.

    Args:
        program: Program with shapes.
        dtype: The compute dtype.

    Returns:
        The table, or why there is none: Triton is not installed (it is Linux only), or interprets kernels.
    """
    try:
        from vlmbuild.ops.triton_util import INTERPRET
    except ModuleNotFoundError:
        return Kernels("triton is not installed")
    if INTERPRET:
        return Kernels("TRITON_INTERPRET is set, and interpreted kernels are not compiled")
    labels: dict[tuple[Any, ...], str] = {}
    regions: dict[str, dict[str, None]] = {}
    chosen: dict[tuple[str, int], Launch] = {}
    for region, target, launch in launches(program, dtype, TARGETS):
        key = meaning(launch, target)
        if key not in labels:
            labels[key] = _label(launch, target, labels.values())
        label = labels[key]
        regions.setdefault(label, {})[region] = None
        chosen.setdefault((label, target), launch)
    rows = _compile_all({key: (launch, key[1]) for key, launch in chosen.items()})
    return Kernels(
        table={
            label: LockedKernel(tuple(regions[label]), {f"sm_{target}": rows[label, target] for target in TARGETS})
            for label in sorted(regions)
        }
    )


def _compile_all(tasks: dict[tuple[str, int], tuple[Launch, int]]) -> dict[tuple[str, int], KernelRow]:
    """Compile what this process has not compiled yet, on all cores: recipes and models share most of their kernels.

    Processes that check other models at the same time compile many of the same. Each takes them in its own order, so that it
    finds other processes' results in Triton's disk cache and rarely compiles a kernel that another is compiling.
    """
    import triton  # type: ignore[import-untyped]

    keys = {label: _key(*task) for label, task in tasks.items()}
    order = random.Random(os.getpid()).sample(list(tasks), len(tasks))  # noqa: S311
    missing = {keys[label]: tasks[label] for label in order if keys[label] not in _compiled}
    with triton.knobs.compilation.scope(), ThreadPoolExecutor(available_cores()) as pool:
        triton.knobs.compilation.disable_line_info = True  # it names files, and sizes must not depend on where they lie
        _compiled.update(zip(missing, pool.map(lambda task: compile_launch(*task), missing.values()), strict=True))
    return {label: _compiled[key] for label, key in keys.items()}


def _label(launch: Launch, target: int, taken: Iterable[str]) -> str:
    """Label a launch: "forward_kernel bf16 GQA=6 DIM=128 ... CAUSAL", numbered where only strides differ."""
    dtype = next(iter(specialize(launch, target).signature.values()))
    parts = [launch.kernel.__name__.strip("_"), dtype.removeprefix("*")]
    for name, value in launch.constants.items():
        if isinstance(value, bool):
            parts += [name] if value and name not in OPTIONS else []
        elif name not in OPTIONS:
            parts.append(f"{name}={value}")
    label = " ".join(parts)
    same = sum(other == label or other.startswith(f"{label} #") for other in taken)
    return f"{label} #{same + 1}" if same else label


def _key(launch: Launch, target: int) -> tuple[Any, ...]:
    return (*meaning(launch, target), *sorted(launch.tile.items()), target)


def launches(program: Program, dtype: torch.dtype, targets: Sequence[int]) -> Iterator[tuple[str, int, Launch]]:
    """Yield (region, target, launch) for a finished program with shapes, in order; needs triton.

    Args:
        program: After the passes.
        dtype: The compute dtype.
        targets: Compute capabilities, 90 for sm_90: tiles depend on them.
    """
    for region, operator, arguments, backward in _calls(program, dtype):
        for target in targets:
            for launch in operator.launches(arguments, target, backward=backward):
                yield region, target, launch


def _calls(program: Program, dtype: torch.dtype) -> Iterator[tuple[str, Operator, tuple[Any, ...], bool]]:
    """Yield (region, operator, arguments, whether it is trained)."""
    for name, region in program.regions.items():
        cached = self_attention(region)
        for node in region.graph.graph.nodes:
            if (operator := _WITH_KERNELS.get(node.target)) is not None:
                arguments = _arguments(node, region, dtype)
                yield name, operator, arguments, True
                if node is cached:
                    yield name, operator, _masked(arguments), False
    for head in dict.fromkeys(variant.calls[-1].region for variant in program.variants.values()):
        vocabulary = int(program.regions[head].results()[0].meta["val"].shape[-1])
        logits = torch.empty((_PRIMES[0], vocabulary), dtype=dtype, device="meta")
        yield head, OPERATORS["cross_entropy"], (logits, logits.new_empty(_PRIMES[0], dtype=torch.int64)), True


def _arguments(node: Node, region: Region, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return a call's arguments, tensors without data in place of nodes."""
    names = sorted(set(region.dimensions.values()))
    sizes = {symbol: _PRIMES[names.index(name)] for symbol, name in region.dimensions.items()}
    arguments: tuple[Any, ...] = map_arg(node.args, lambda argument: _concrete(argument.meta["val"], sizes, dtype))
    return arguments


def _masked(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of attention with a mask of keys in place of bounds."""
    query, key, value, _mask, _bounds, *rest = arguments
    mask = torch.empty((key.shape[0], key.shape[2]), dtype=torch.int64, device="meta")
    return (query, key, value, mask, None, *rest)


def _concrete(value: Tensor, sizes: dict[str, int], dtype: torch.dtype) -> Tensor:
    """Make a tensor of given sizes; bfloat16 stands for the compute dtype."""
    shape, strides = ([_evaluated(size, sizes) for size in numbers] for numbers in (value.shape, value.stride()))
    kind = dtype if value.dtype == torch.bfloat16 else value.dtype
    return torch.empty_strided(shape, strides, dtype=kind, device="meta")


def _evaluated(size: int | torch.SymInt, sizes: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.expr.subs({symbol: sizes[str(symbol)] for symbol in size.node.expr.free_symbols}))
