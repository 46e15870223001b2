"""Every Triton launch of a program on a GPU, found without one: its regions run on tensors without data.

Of training, forward and backward; and of generation: a prompt's
attention on a key-value cache, and that of steps after it.
Sizes that change from batch to batch are primes, so that a kernel is compiled for no lucky size; they are large and small
once, since a launcher may choose its blocks by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vlmbuild.ir.program import Program, Region
from vlmbuild.kv_cache.block import CachedBlock, cached_block, self_attention
from vlmbuild.ops.attention.op import Masks
from vlmbuild.runtime.torch.region_instance import BoundRegion, is_compute

if TYPE_CHECKING:
    from vlmbuild.ops.triton_util import Launch

_LARGE, _SMALL = (1009, 1013, 1019, 1021, 1031, 1033), (101, 103, 107, 109, 113, 127)
_CACHED = ((3, 1013, 0), (3, 1, 1013), (3, 1, 1023), (3, 1, 101))
"""Batch, new and past tokens: a prompt, a step on a long cache, on one whose length is a multiple of 16, on a short one."""
_OPS = torch.ops.vlmbuild
_ATTENTION = (_OPS.attention_triton.default, _OPS.attention_auto.default)


def launches(program: Program, dtype: torch.dtype, targets: Sequence[int]) -> Iterator[tuple[str, int, Launch]]:
    """(region, target, launch) of a finished program with shapes, in order; needs triton.

    Args:
        program: After the passes.
        dtype: The compute dtype.
        targets: Compute capabilities, 90 for sm_90: tiles depend on them.
    """
    for name, region in program.regions.items():
        for sizes in (_LARGE, _SMALL):
            for target, launch in _region_launches(region, sizes, dtype, targets):
                yield name, target, launch
        if (block := cached_block(region, "growing")) is not None:
            yield from _cached_launches(region, block, dtype, targets)
    for head in dict.fromkeys(variant.calls[-1].region for variant in program.variants.values()):
        for target in targets:
            yield head, target, _loss_launch(program.regions[head], dtype)


def _region_launches(
    region: Region, sizes: tuple[int, ...], dtype: torch.dtype, targets: Sequence[int]
) -> Iterator[tuple[int, Launch]]:
    """Of a region's graph, for these sizes of the program's dimensions."""
    recorder = _Recorder(BoundRegion(region, dtype, ()).graph)
    names = sorted(set(region.dimensions.values()))
    with torch.no_grad():
        recorder.run(*_tensors(region, dict(zip(names, sizes, strict=False)), dtype))
    for operator, arguments in recorder.calls:
        for target in targets:
            for launch in _launches_of(operator, arguments, target):
                yield target, launch


def _cached_launches(
    region: Region, block: CachedBlock, dtype: torch.dtype, targets: Sequence[int]
) -> Iterator[tuple[str, int, Launch]]:
    """Of a block's attention on a cache. Its other operators launch what they do without one, on fewer rows."""
    graph = BoundRegion(block.region, dtype, ()).graph
    for batch, new, past in _CACHED:
        recorder = _Recorder(graph)
        with torch.no_grad():
            recorder.run(*_cached_tensors(region, block, (batch, new, past), dtype))
        for operator, arguments in recorder.calls:
            for target in targets if operator in _ATTENTION else ():
                for launch in _forward_launches(*arguments, target=target):
                    yield block.region.name, target, launch


def _cached_tensors(
    region: Region, block: CachedBlock, counts: tuple[int, int, int], dtype: torch.dtype
) -> list[Tensor]:
    """The block's tensors, a mask in the place of the bounds, and cached keys and values at the end."""
    batch, new, past = counts
    site = self_attention(region)
    assert site is not None
    heads, dim = (int(site.args[1].meta["val"].shape[axis]) for axis in (1, 3))  # type: ignore[union-attr]
    names = sorted(set(region.dimensions.values()))
    tensors = _tensors(region, dict(zip(names, _LARGE, strict=False)) | {"sequence": batch * new}, dtype)
    tensors[len(region.slots) + block.bounds] = torch.empty((batch, past + new), dtype=torch.int64, device="meta")
    return tensors + [torch.empty((batch, heads, past, dim), dtype=dtype, device="meta") for _ in range(2)]


class _Recorder(Interpreter):
    """Runs a graph and keeps the arguments of operators that have Triton kernels."""

    def __init__(self, graph: Any) -> None:
        super().__init__(graph)
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in (*_ATTENTION, _OPS.mrope_rotate.default):
            self.calls.append((target, args))
        return super().call_function(target, args, kwargs)


def _launches_of(operator: Any, arguments: tuple[Any, ...], target: int) -> tuple[Launch, ...]:
    if operator in _ATTENTION:
        return _attention_launches(*arguments, target=target)
    return _rotate_launches(*arguments)


def _attention_launches(query: Tensor, key: Tensor, value: Tensor, *rest: Any, target: int) -> tuple[Launch, ...]:
    from vlmbuild.ops.attention.triton import backward_launches

    *masks, causal, scale = rest
    out, logsumexp = _attention_results(query)
    grads = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    backward = backward_launches(
        out, query, key, value, Masks(*masks), out, logsumexp, logsumexp, grads, causal, scale, target
    )
    return (*_forward_launches(query, key, value, *rest, target=target), *backward)


def _forward_launches(query: Tensor, key: Tensor, value: Tensor, *rest: Any, target: int) -> tuple[Launch, ...]:
    from vlmbuild.ops.attention.triton import forward_launches

    *masks, causal, scale = rest
    return forward_launches(query, key, value, Masks(*masks), *_attention_results(query), causal, scale, target)


def _attention_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    batch, heads, length, dim = query.shape
    return query.new_empty((batch, length, heads, dim)), query.new_empty((batch, heads, length), dtype=torch.float32)


def _rotate_launches(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Launch, ...]:
    """Forward, and backward on the contiguous gradients that attention returns."""
    from vlmbuild.ops.rope.triton import rotate_launch

    grads = (query.new_empty(query.shape), key.new_empty(key.shape))
    return (
        rotate_launch(query, key, cos, sin, torch.empty_like(query), torch.empty_like(key)),
        rotate_launch(*grads, cos, sin, torch.empty_like(grads[0]), torch.empty_like(grads[1]), back=True),
    )


def _loss_launch(head: Region, dtype: torch.dtype) -> Launch:
    """Of the loss, which is taken outside of the graph."""
    from vlmbuild.ops.cross_entropy.triton import cross_entropy_launch

    logits = torch.empty((_LARGE[0], head.results()[0].meta["val"].shape[-1]), dtype=dtype, device="meta")
    targets = logits.new_empty(logits.shape[:1], dtype=torch.int64)
    return cross_entropy_launch(logits, targets, logits.new_empty(targets.shape, dtype=torch.float32), logits)


def _tensors(region: Region, sizes: dict[str, int], dtype: torch.dtype) -> list[Tensor]:
    """Slots, then activations, for these sizes of the program's dimensions."""
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
