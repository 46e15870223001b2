"""Trace a repeated block once: of blocks that are equal but for their weights, the first is traced, and each of the others
becomes one `repeat` node that names what went into the first and what came out of it.

The model's own code between the blocks runs for every block, so what it does with a block's number or result stays in the
graph. Nothing is taken on trust but this: a block's result follows from its attributes and arguments, and is all it does.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, complex, str, bytes, set, frozenset, torch.dtype, torch.device, torch.Size, type(None))
_OWN = ("_parameters", "_buffers", "_modules")
_NUMBER = "layer_idx"
"""Where transformers' blocks keep their place in the list."""


@torch.library.custom_op("vlmbuild::repeat", mutates_args=())
def repeat(inputs: list[Tensor], first_inputs: list[Tensor], first_result: Tensor) -> Tensor:
    """What the block that made `first_result` of `first_inputs` makes of `inputs` with weights of its own.

    Stands in traced graphs only; outlining replaces it by the call of a region.
    """
    raise NotImplementedError


@repeat.register_fake
def _(inputs: list[Tensor], first_inputs: list[Tensor], first_result: Tensor) -> Tensor:
    return torch.empty_like(first_result)


REPEAT = torch.ops.vlmbuild.repeat.default


def trace_once(module: nn.Module) -> nn.Module:
    """Prepare a module, in place, for a single trace in which equal blocks appear as `repeat` nodes.

    Blocks are children of the outermost `ModuleList`s. They are equal if their classes, attributes and submodules are, and
    the shapes and dtypes of their tensors. A block whose class looks at its place in the list (`layer_idx`) is traced in
    full, and so is a call with arguments unlike those of the first.
    """
    uses = Counter(
        id(tensor)
        for named in (module.named_parameters, module.named_buffers)
        for _, tensor in named(remove_duplicate=False)
    )
    for blocks in _lists(module):
        kinds: list[list[nn.Module]] = []
        for block in blocks:
            if any(uses[id(tensor)] > 1 for tensor in (*block.parameters(), *block.buffers())):
                continue  # a shared tensor is not the block's own
            kind = next((kind for kind in kinds if _equal_modules(kind[0], block)), None)
            if kind is None:
                kinds.append(kind := [])
            kind.append(block)
        for kind in kinds:
            calls: list[_Call] = []
            for block in kind:
                _intercept(block, calls)
    return module


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _lists(child)


@dataclass(slots=True)
class _Call:
    """A call that was traced in full: its arguments, which another must be like to repeat it, and its result."""

    leaves: list[Any]
    structure: Any
    result: Tensor
    wrap: Callable[[Tensor], Any]


def _intercept(block: nn.Module, calls: list[_Call]) -> None:
    """Make a call of the block repeat a call of an equal block; the first, and those unlike it, are traced and kept."""
    original = block.forward
    numbers = [_watch_number(part) for part in block.modules() if isinstance(getattr(part, _NUMBER, None), int)]
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
            number.seen = False
        results = original(*args, **kwargs)
        if not again and not any(number.seen for number in numbers):
            calls.extend(_repeatable(leaves, structure, results))
        return results

    block.forward = forward  # the module is ours, made for this trace


def _repeatable(arguments: list[Any], structure: Any, results: Any) -> list[_Call]:
    """The call as others can repeat it: if it returns one new tensor, and what else it returns is plain."""
    leaves, form = pytree.tree_flatten(results)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    plain = all(type(leaf) in _PLAIN for place, leaf in enumerate(leaves) if place not in places)
    if len(places) != 1 or not plain or any(leaves[places[0]] is value for value in arguments):
        return []

    def wrap(result: Tensor) -> Any:
        return pytree.tree_unflatten([result if place in places else leaf for place, leaf in enumerate(leaves)], form)

    return [_Call(arguments, structure, leaves[places[0]], wrap)]


def _tensors_of(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _seen(leaves: list[Any]) -> list[Any]:
    """What tracing can see of arguments, at this moment: it may learn only while tracing that two sizes are one."""
    return [_describe(leaf, leaves) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _describe(tensor: Tensor, leaves: list[Any]) -> tuple[Any, ...]:
    """A tensor that is passed twice is told from two that look alike."""
    sizes = [size if isinstance(size, int) else str(size) for size in (*tensor.shape, *tensor.stride())]
    place = next(place for place, leaf in enumerate(leaves) if leaf is tensor)
    return (place, type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, sizes)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are surely equal: plain values that are, collections of such, or one immutable object."""
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
    """Whether two modules compute the same, but for the values of their tensors and their numbers."""
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
    found = [*module._parameters.items(), *module._buffers.items()]
    return [(name, None if value is None else (value.shape, value.dtype, value.requires_grad)) for name, value in found]


class _Number:
    """A block's place in its list, which remembers whether anything looked at it."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.seen = False

    @property  # type: ignore[misc]
    def __class__(self) -> type[int]:  # type: ignore[override]
        """`isinstance` asks for it."""
        self.seen = True
        return int


def _telling(name: str) -> Callable[..., Any]:
    def method(self: _Number, *args: Any) -> Any:
        self.seen = True
        result = getattr(self.value, name)(*args)
        if result is NotImplemented and hasattr(float, name):
            return getattr(float(self.value), name)(*args)
        return result

    return method


for _name in vars(int):  # Python looks operators up on the class
    if _name.startswith("__") and _name not in ("__new__", "__init__", "__doc__", "__getattribute__", "__class__"):
        setattr(_Number, _name, _telling(_name))


def _watch_number(part: nn.Module) -> _Number:
    number = _Number(getattr(part, _NUMBER))
    vars(part)[_NUMBER] = number  # setattr of a module would look at it
    return number
