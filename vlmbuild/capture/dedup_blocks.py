"""Trace a repeated block once: the first of several blocks that differ only in their weights is traced, and each of the
others becomes one `repeat` node that names the inputs and the result of the first.

The model's own code between the blocks runs for every block, so what it does with a block's number or result stays in the
graph. One assumption is made: a block's result depends on its attributes and arguments alone, and it has no other effect.

No class or function is replaced. While `dedup_blocks` is open, blocks of the one module that was made for the trace have an
attribute `forward` of their own, which either calls the block's or emits a `repeat` node, and a class of their own, which
notices when their number (`layer_idx`) is read. Both are taken away again when the context ends.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, complex, str, bytes, set, frozenset, torch.dtype, torch.device, torch.Size, type(None))
_OWN = ("_parameters", "_buffers", "_modules")
_NUMBER = "layer_idx"
"""The attribute in which blocks of transformers keep their position in the list."""


@torch.library.custom_op("vlmbuild::repeat", mutates_args=())
def repeat(inputs: list[Tensor], first_inputs: list[Tensor], first_result: Tensor) -> Tensor:
    """Compute for `inputs` what the block that computed `first_result` from `first_inputs` would, with other weights.

    Only in traced graphs: outlining replaces it by the call of a region.
    """
    raise NotImplementedError


@repeat.register_fake
def _(inputs: list[Tensor], first_inputs: list[Tensor], first_result: Tensor) -> Tensor:
    return torch.empty_like(first_result)


REPEAT = torch.ops.vlmbuild.repeat.default


@contextmanager
def dedup_blocks(module: nn.Module) -> Iterator[None]:
    """Let traces of the module have `repeat` nodes in place of equal blocks, while the context is open.

    Blocks are children of the outermost `ModuleList`s. They are equal if their classes, attributes and submodules are, and
    the shapes and dtypes of their tensors. A block whose code reads its position in the list (`layer_idx`) is traced in
    full, and so is a call whose arguments differ from those of the first.
    """
    with ExitStack() as stack:
        for kind in _kinds(module):
            calls: list[_Call] = []
            for block in kind:
                stack.enter_context(_intercept(block, calls))
        yield


def _kinds(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Group the blocks of each list that are equal; a block with a tensor of another module is in no group."""
    uses = Counter(
        id(tensor)
        for named in (module.named_parameters, module.named_buffers)
        for _, tensor in named(remove_duplicate=False)
    )
    for blocks in _lists(module):
        kinds: list[list[nn.Module]] = []
        for block in blocks:
            if any(uses[id(tensor)] > 1 for tensor in (*block.parameters(), *block.buffers())):
                continue
            kind = next((kind for kind in kinds if _equal_modules(kind[0], block)), None)
            if kind is None:
                kinds.append(kind := [])
            kind.append(block)
        yield from kinds


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _lists(child)


@dataclass(slots=True)
class _Call:
    """A call that was traced in full, and that equal calls repeat.

    Attributes:
        leaves: Its arguments, flattened.
        structure: Their structure, and whether gradients were enabled.
        result: The tensor that it returned.
        wrap: Puts a tensor in the place of the result.
    """

    leaves: list[Any]
    structure: Any
    result: Tensor
    wrap: Callable[[Tensor], Any]


@contextmanager
def _intercept(block: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Let a call of the block repeat one of the calls of equal blocks; other calls are traced and added to them."""
    original = block.forward
    numbers = [_Number(part) for part in block.modules() if _NUMBER in vars(part)]
    called = False

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        leaves, form = pytree.tree_flatten((args, kwargs))
        structure = (form, torch.is_grad_enabled())
        again, called = called, True
        for call in calls:
            if not again and _same(call.structure, structure) and _same(_seen(call.leaves), _seen(leaves)):
                return call.wrap(repeat(_tensors_of(leaves), _tensors_of(call.leaves), call.result))
        for number in numbers:
            number.read = False
        results = original(*args, **kwargs)
        if not again and not any(number.read for number in numbers):
            calls.extend(_repeatable(leaves, structure, results))
        return results

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        for number in numbers:
            number.end()


def _repeatable(arguments: list[Any], structure: Any, results: Any) -> list[_Call]:
    """Return the call in a list if others can repeat it: it returns one new tensor, beside plain values."""
    leaves, form = pytree.tree_flatten(results)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    plain = all(type(leaf) in _PLAIN for leaf in leaves if not isinstance(leaf, Tensor))
    if len(tensors) != 1 or not plain or any(tensors[0] is value for value in arguments):
        return []

    def wrap(result: Tensor) -> Any:
        return pytree.tree_unflatten([result if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)

    return [_Call(arguments, structure, tensors[0], wrap)]


def _tensors_of(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _seen(leaves: list[Any]) -> list[Any]:
    """Describe arguments as tracing knows them at this moment: it may learn later that two sizes are equal."""
    return [_describe(leaf, leaves) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _describe(tensor: Tensor, leaves: list[Any]) -> tuple[Any, ...]:
    """Describe a tensor; its first index tells a tensor that is passed twice from two that look alike."""
    sizes = [size if isinstance(size, int) else str(size) for size in (*tensor.shape, *tensor.stride())]
    first = next(index for index, leaf in enumerate(leaves) if leaf is tensor)
    return (first, type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, sizes)


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are surely equal: equal plain values, or collections of them."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    if type(one) in _PLAIN or isinstance(one, type | pytree.TreeSpec):
        return bool(one == other)
    return False


def _equal_modules(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules compute the same, except for the values of their tensors and their numbers."""
    if type(one) is not type(other):
        return False
    mine, theirs = (_attributes(module) for module in (one, other))
    if list(mine) != list(theirs) or list(one._modules) != list(other._modules):
        return False
    if not all(mine[name] is theirs[name] or _same(mine[name], theirs[name]) for name in mine):
        return False
    return _same(_tensors(one), _tensors(other)) and all(
        first is second or (first is not None and second is not None and _equal_modules(first, second))
        for first, second in zip(one._modules.values(), other._modules.values(), strict=True)
    )


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in (*_OWN, _NUMBER)}


def _tensors(module: nn.Module) -> list[Any]:
    tensors = [*module._parameters.items(), *module._buffers.items()]
    return [
        (name, None if value is None else (value.shape, value.dtype, value.requires_grad)) for name, value in tensors
    ]


class _Number:
    """Notices whether a block's position in its list is read, by a class of the block's own with a property of that name."""

    def __init__(self, part: nn.Module) -> None:
        self.read = False
        self._part, self._class = part, type(part)

        def number(module: nn.Module) -> Any:
            self.read = True
            return vars(module)[_NUMBER]

        part.__class__ = type(self._class.__name__, (self._class,), {_NUMBER: property(number)})

    def end(self) -> None:
        """Give the block its class back."""
        self._part.__class__ = self._class
