"""Give a loaded program the symbolic shapes that a captured one has: those of the inputs, carried through its regions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from vlmbuild.pipeline import refresh
from vlmbuild.program import Input, Program, Region, Variant, parse_size

_SIZES = (3, 23, 13, 7, 19, 29)  # distinct, and neither 0 nor 1


def propagate_shapes(program: Program) -> None:
    """Fill in `meta["val"]` of every node, and the regions' dimensions, in place."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbols: dict[str, torch.SymInt] = {}
    done: set[str] = set()
    for variant in program.variants.values():
        _propagate(program, variant, mode, symbols, done)
    names = {str(symbol.node.expr): name for name, symbol in symbols.items()}
    for region in program.regions.values():
        region.dimensions = names


def _propagate(
    program: Program, variant: Variant, mode: FakeTensorMode, symbols: dict[str, torch.SymInt], done: set[str]
) -> None:
    values = {entry.name: _input(entry, mode, symbols) for entry in variant.inputs}
    for call in variant.calls:
        region = program.regions[call.region]
        if call.region not in done:
            _fill(region, tuple(values[name] for name in call.inputs), mode)
            done.add(call.region)
        results = [node.meta["val"] for node in region.results()]
        values.update(zip(call.outputs, results, strict=True))


def _fill(region: Region, activations: tuple[Tensor, ...], mode: FakeTensorMode) -> None:
    with mode:
        slots = [torch.empty(slot.shape, dtype=slot.dtype, device="meta") for slot in region.slots]
    for node, value in zip(region.placeholders(), [*slots, *activations], strict=True):
        node.meta["val"] = value
    refresh(region)


def _input(entry: Input, mode: FakeTensorMode, symbols: dict[str, torch.SymInt]) -> Tensor:
    shape = [size if isinstance(size, int) else _size(size, mode, symbols) for size in entry.shape]
    with mode:
        return torch.empty(shape, dtype=entry.dtype, device="meta")


def _size(size: str, mode: FakeTensorMode, symbols: dict[str, torch.SymInt]) -> int | torch.SymInt:
    factor, name = parse_size(size)
    if name not in symbols:
        shape_env = mode.shape_env
        assert shape_env is not None
        hint, source = _SIZES[len(symbols) % len(_SIZES)] + 30 * (len(symbols) // len(_SIZES)), ConstantSource(name)
        symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        symbols[name] = shape_env.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[assignment]
    return symbols[name] if factor == 1 else factor * symbols[name]
