"""Give a program's text a key-value cache, so that a step of generation computes its new tokens alone.

A loaded model derives its cached program when it first generates; the ONNX and AOTInductor targets store theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from vlmbuild.ir.dims import Dim, Shape
from vlmbuild.ir.program import COMPUTE_DTYPE, Call, Input, Program, Region, Variant
from vlmbuild.ir.shapes import Shapes
from vlmbuild.kv_cache.block import CachedBlock, CacheForm, cached_block, external_keys, self_attention
from vlmbuild.kv_cache.split_images import split_images

STEP = "decode"
"""The variant of steps after a prompt with images, where blocks read images; elsewhere it is "text"."""
MASK, POSITION = "attention_mask", "cache_position"
PAST, PRESENT, CROSS = "past_key_values", "present", "cross_key_values"
TOKENS = Dim.parse("batch*new")
"""The size of values that have a row for every token."""
TOTAL = Dim.parse("past + new")
"""The number of tokens of a row once a step has run."""
_SEQUENCE = Dim.named("sequence")


def with_cache(program: Program, form: CacheForm = "dynamic") -> Program:
    """Derive a program whose variants take a key-value cache, and return it grown or write into it.

    A batch is padded here: `new` tokens of each of `batch` rows, row by row, with a mask over all tokens so far. These inputs
    and results are added, where N is the number of a decoder block:

        dynamic  attention_mask           i64[batch, past + new]
                 past_key_values.N.key    compute[batch, kv heads, past, head dim], and .value
                 present.N.key            compute[batch, kv heads, past + new, head dim], and .value
        static   attention_mask           i64[batch, length], zero where nothing is written yet
                 past_key_values.N.key    compute[batch, kv heads, length, head dim], and .value; written in place
                 cache_position           i64[1], where the step's token is written

    The dynamic form serves prompts (past = 0) and steps, the static one steps of one token. Where blocks read images by
    cross-attention, the variant "image" also returns their keys and values of the images, and a variant "decode", for the
    steps after it, takes them: cross_key_values.N.key and .value.

    Args:
        program: After its passes. It stays as it is; regions that need no change are shared.
        form: Form of the cache, growing with each step or of a fixed length.

    Raises:
        PassError: A block has no form that can be cached.
    """
    if has_cache(program):
        return program
    split, images = split_images(program)
    attending = {name for name, region in split.regions.items() if self_attention(region) or external_keys(region)}
    shapes = Shapes(split, attending)
    _name_cross(split, images)
    _add_step(split, images, shapes)
    if form == "static":
        split.variants = {name: v for name, v in split.variants.items() if name == STEP or not images[name]}
    cached = _with_blocks(split, shapes, form)
    changed = cached.regions.keys() - program.regions.keys()
    final = Shapes(cached, changed)
    for name in changed:
        final.annotate(cached.regions[name])
    return cached


def has_cache(program: Program) -> bool:
    """Return whether a program takes a key-value cache."""
    return any(entry.name == MASK for variant in program.variants.values() for entry in variant.inputs)


def cached_inputs(variant: Variant) -> tuple[Input, ...]:
    """Return a variant's cached keys and values, in pairs."""
    return tuple(entry for entry in variant.inputs if entry.name.startswith(f"{PAST}."))


def present_name(past: str) -> str:
    """Return the name of a cached key or value after a step."""
    return past.replace(PAST, PRESENT, 1)


def _name_cross(program: Program, images: dict[str, frozenset[str]]) -> None:
    """Name the keys and values of images that blocks read, and let their variant return them."""
    for name, variant in program.variants.items():
        named: dict[str, str] = {}
        for call in variant.calls:
            for index, kind in external_keys(program.regions[call.region]).items():
                if call.instance and call.inputs[index] in images[name]:
                    named[call.inputs[index]] = f"{CROSS}.{_number(call)}.{kind}"
        calls = tuple(_renamed(call, named) for call in variant.calls)
        program.variants[name] = replace(variant, calls=calls, presents=tuple(named.values()))
        images[name] = frozenset(named.get(value, value) for value in images[name])


def _add_step(program: Program, images: Mapping[str, frozenset[str]], shapes: Shapes) -> None:
    """Add the part of a variant that reads tokens as a variant, where its blocks read images too."""
    for name, variant in list(program.variants.items()):
        if not variant.presents:
            continue
        calls = tuple(call for call in variant.calls if not images[name].issuperset(call.inputs))
        crossing = {value: shape for call in calls for value, shape in _shapes_of(call, program, shapes)}
        read = {value for call in calls for value in call.inputs}
        inputs = [entry for entry in variant.inputs if entry.name in read]
        known = {entry.name for entry in inputs}
        inputs += [
            Input(value, COMPUTE_DTYPE, crossing[value])
            for value in dict.fromkeys(value for call in calls for value in call.inputs)
            if value in images[name] and value not in known
        ]
        program.variants[STEP] = Variant(tuple(inputs), calls, variant.output)


def _shapes_of(call: Call, program: Program, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
    """Yield the name and shape of each of a call's inputs."""
    region = program.regions[call.region]
    for value, node in zip(call.inputs, region.placeholders()[len(region.slots) :], strict=True):
        yield value, shapes.sizes(shapes.values[region.name][node])


def _heads(region: Region, shapes: Shapes) -> tuple[int, int]:
    """Return key heads and head dimension of a block's self-attention."""
    site = self_attention(region)
    assert site is not None
    _, heads, _, dim = shapes.values[region.name][site.args[1]].shape  # type: ignore[index]
    return int(heads), int(dim)


def _with_blocks(program: Program, shapes: Shapes, form: CacheForm) -> Program:
    """Replace blocks by cached ones, and keep the regions that calls still need."""
    blocks = {name: block for name, region in program.regions.items() if (block := cached_block(region, form))}
    heads = {name: _heads(program.regions[name], shapes) for name in blocks}
    variants = {name: _cached(variant, blocks, heads, form) for name, variant in program.variants.items()}
    known = program.regions | {block.region.name: block.region for block in blocks.values()}
    used = dict.fromkeys(call.region for variant in variants.values() for call in variant.calls)
    return Program(program.family, program.geometry, variants, {name: known[name] for name in used}, program.ties)


def _cached(
    variant: Variant, blocks: Mapping[str, CachedBlock], heads: Mapping[str, tuple[int, int]], form: CacheForm
) -> Variant:
    past, rows, tokens = (
        ("past", TOTAL, TOKENS) if form == "dynamic" else ("length", Dim.named("length"), Dim.named("batch"))
    )
    inputs = {
        entry.name: replace(entry, shape=tuple(tokens if size == _SEQUENCE else size for size in entry.shape))
        for entry in variant.inputs
    }
    inputs[MASK] = Input(MASK, torch.int64, ("batch", rows))
    if form == "static":
        inputs[POSITION] = Input(POSITION, torch.int64, (1,))
    calls: list[Call] = []
    presents: list[str] = []
    for call in variant.calls:
        if call.region not in blocks:
            calls.append(call)
            continue
        names = [f"{PAST}.{_number(call)}.{kind}" for kind in ("key", "value")]
        of_block, dim = heads[call.region]
        inputs |= {name: Input(name, COMPUTE_DTYPE, ("batch", of_block, past, dim)) for name in names}
        grown = [present_name(name) for name in names] if form == "dynamic" else []
        calls.append(_with_cache(call, blocks[call.region], (*names, *([POSITION] if form == "static" else [])), grown))
        presents += grown
    read = {value for call in calls for value in call.inputs}
    kept = tuple(entry for entry in inputs.values() if entry.name in read)
    return Variant(kept, tuple(calls), variant.output, (*presents, *variant.presents))


def _with_cache(call: Call, block: CachedBlock, names: tuple[str, ...], grown: list[str]) -> Call:
    inputs = (*call.inputs[: block.bounds], MASK, *call.inputs[block.bounds + 1 :], *names)
    return Call(block.region.name, call.instance, inputs, (*call.outputs, *grown))


def _renamed(call: Call, names: Mapping[str, str]) -> Call:
    inputs, outputs = (tuple(names.get(value, value) for value in values) for values in (call.inputs, call.outputs))
    return replace(call, inputs=inputs, outputs=outputs)


def _number(call: Call) -> str:
    """Return a block's number in its list, the last part of its name."""
    return call.instance.rpartition(".")[2]
