"""The kernel table of a lock: every Triton kernel that a program launches, compiled for GPUs that are not there.

A program's regions run on tensors without data, and each operator names its launches (`vlmbuild.ops.operator.Operator`):
training, forward and backward; and generation, a prompt's attention on a key-value cache and that of steps after it. Sizes
that change from batch to batch are primes, so that no kernel is compiled for a divisible size. They are large and small once,
because a launcher may choose its blocks by them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vlmbuild.ir.program import Program, Region
from vlmbuild.kv_cache.block import CachedBlock, cached_block, self_attention
from vlmbuild.locks.document import Kernels, LockedKernel
from vlmbuild.locks.kernel_compile import OPTIONS, POINTERS, Row, compile_launch, meaning
from vlmbuild.ops import OPERATORS, Operator
from vlmbuild.runtime.torch.region_instance import BoundRegion, is_compute
from vlmbuild.util.cpu import available_cores

if TYPE_CHECKING:
    from vlmbuild.ops.triton_util import Launch

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100, B200."""
_LARGE, _SMALL = (1009, 1013, 1019, 1021, 1031, 1033), (101, 103, 107, 109, 113, 127)
_CACHED = ((3, 1013, 0), (3, 1, 1013), (3, 1, 1023), (3, 1, 101))
"""Batch, new and past tokens: a prompt, a step on a long cache, on one whose length is a multiple of 16, on a short one."""
_WITH_KERNELS = {row.overload: row for row in OPERATORS.values() if row.kernels is not None and row.in_programs}
_compiled: dict[tuple[Any, ...], Row] = {}


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
        label = labels.setdefault(meaning(launch), _label(launch, labels.values()))
        regions.setdefault(label, {})[region] = None
        chosen.setdefault((label, target), launch)
    rows = _compile_all({key: (launch, key[1]) for key, launch in chosen.items()})
    return Kernels(
        table={
            label: LockedKernel(tuple(regions[label]), {f"sm_{target}": rows[label, target] for target in TARGETS})
            for label in sorted(regions)
        }
    )


def _compile_all(tasks: dict[tuple[str, int], tuple[Launch, int]]) -> dict[tuple[str, int], Row]:
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


def _label(launch: Launch, taken: Iterable[str]) -> str:
    """Label a launch: "forward_kernel bf16 GQA=6 DIM=128 ... CAUSAL", numbered where only strides differ."""
    dtype = POINTERS[launch.arguments[0].dtype].removeprefix("*")
    parts = [launch.kernel.__name__.strip("_"), dtype]
    for name, value in launch.constants.items():
        if isinstance(value, bool):
            parts += [name] if value and name not in OPTIONS else []
        elif name not in OPTIONS:
            parts.append(f"{name}={value}")
    label = " ".join(parts)
    same = sum(other == label or other.startswith(f"{label} #") for other in taken)
    return f"{label} #{same + 1}" if same else label


def _key(launch: Launch, target: int) -> tuple[Any, ...]:
    return (*meaning(launch), *sorted(launch.tile.items()), target)


def launches(program: Program, dtype: torch.dtype, targets: Sequence[int]) -> Iterator[tuple[str, int, Launch]]:
    """Yield (region, target, launch) for a finished program with shapes, in order; needs triton.

    Args:
        program: After the passes.
        dtype: The compute dtype.
        targets: Compute capabilities, 90 for sm_90: tiles depend on them.
    """
    for name, region in program.regions.items():
        for sizes in (_LARGE, _SMALL):
            for target, launch in _region_launches(region, sizes, dtype, targets):
                yield name, target, launch
        if (block := cached_block(region, "dynamic")) is not None:
            yield from _cached_launches(region, block, dtype, targets)
    for head in dict.fromkeys(variant.calls[-1].region for variant in program.variants.values()):
        logits = torch.empty((_LARGE[0], _vocabulary(program.regions[head])), dtype=dtype, device="meta")
        arguments = (logits, logits.new_empty(logits.shape[:1], dtype=torch.int64))
        for target in targets:
            for launch in OPERATORS["cross_entropy"].launches(arguments, target):
                yield head, target, launch


def _vocabulary(head: Region) -> int:
    return int(head.results()[0].meta["val"].shape[-1])


def _region_launches(
    region: Region, sizes: tuple[int, ...], dtype: torch.dtype, targets: Sequence[int]
) -> Iterator[tuple[int, Launch]]:
    """Yield (target, launch) of a region's graph, for these sizes of the program's dimensions."""
    recorder = _Recorder(BoundRegion(region, dtype, ()).graph)
    names = sorted(set(region.dimensions.values()))
    with torch.no_grad():
        recorder.run(*_tensors(region, dict(zip(names, sizes, strict=False)), dtype))
    for operator, arguments in recorder.calls:
        for target in targets:
            for launch in operator.launches(arguments, target):
                yield target, launch


def _cached_launches(
    region: Region, block: CachedBlock, dtype: torch.dtype, targets: Sequence[int]
) -> Iterator[tuple[str, int, Launch]]:
    """Yield launches of a block's attention on a cache. Its other operators launch the same kernels as without one."""
    graph = BoundRegion(block.region, dtype, ()).graph
    for batch, new, past in _CACHED:
        recorder = _Recorder(graph)
        with torch.no_grad():
            recorder.run(*_cached_tensors(region, block, (batch, new, past), dtype))
        for operator, arguments in recorder.calls:
            for target in targets if operator.kind == "attention" else ():
                for launch in operator.launches(arguments, target, backward=False):
                    yield block.region.name, target, launch


def _cached_tensors(
    region: Region, block: CachedBlock, counts: tuple[int, int, int], dtype: torch.dtype
) -> list[Tensor]:
    """Return the block's tensors, with a mask instead of the bounds, and cached keys and values at the end."""
    batch, new, past = counts
    site = self_attention(region)
    assert site is not None
    heads, dim = (int(site.args[1].meta["val"].shape[axis]) for axis in (1, 3))  # type: ignore[union-attr]
    names = sorted(set(region.dimensions.values()))
    tensors = _tensors(region, dict(zip(names, _LARGE, strict=False)) | {"sequence": batch * new}, dtype)
    tensors[len(region.slots) + block.bounds] = torch.empty((batch, past + new), dtype=torch.int64, device="meta")
    return tensors + [torch.empty((batch, heads, past, dim), dtype=dtype, device="meta") for _ in range(2)]


class _Recorder(Interpreter):
    """Runs a graph and records the calls of operators that have Triton kernels."""

    def __init__(self, graph: Any) -> None:
        super().__init__(graph)
        self.calls: list[tuple[Operator, tuple[Any, ...]]] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (operator := _WITH_KERNELS.get(target)) is not None:
            self.calls.append((operator, args))
        return super().call_function(target, args, kwargs)


def _tensors(region: Region, sizes: dict[str, int], dtype: torch.dtype) -> list[Tensor]:
    """Return slots, then activations, for these sizes of the program's dimensions."""
    chosen = {symbol: sizes[name] for symbol, name in region.dimensions.items()}
    slots = [
        torch.empty(slot.shape, dtype=dtype if is_compute(slot) else slot.dtype, device="meta") for slot in region.slots
    ]
    return slots + [_activation(node, chosen, dtype) for node in region.placeholders()[len(region.slots) :]]


def _activation(node: Node, sizes: dict[str, int], dtype: torch.dtype) -> Tensor:
    value = node.meta["val"]
    shape = [size if isinstance(size, int) else _evaluated(size, sizes) for size in value.shape]
    return torch.empty(shape, dtype=dtype if value.dtype == torch.bfloat16 else value.dtype, device="meta")


def _evaluated(size: torch.SymInt, sizes: dict[str, int]) -> int:
    return int(size.node.expr.subs({symbol: sizes[str(symbol)] for symbol in size.node.expr.free_symbols}))
