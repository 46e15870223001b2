"""Run prompts and steps of a generation: a model's program with a key-value cache, derived when it first generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families import Family, PackedBatch, check_ids
from vlmbuild.ir.program import Call, Input, Program, Variant
from vlmbuild.kv_cache.block import CacheForm
from vlmbuild.kv_cache.program import MASK, PAST, POSITION, STEP, TOKENS, present_name, with_cache
from vlmbuild.runtime.compiler import Compiler
from vlmbuild.runtime.generation import media_shapes
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.torch.execution import run_calls
from vlmbuild.runtime.torch.region_instance import BoundRegion, RegionRunner
from vlmbuild.runtime.torch.sharding import check_same_variant, gather_unreached
from vlmbuild.runtime.torch.state import module_at

if TYPE_CHECKING:
    from vlmbuild.runtime.torch.model import VisionLanguageModel

_OF_PROMPTS = {"position_ids", "inputs_embeds"}
"""Given here too, they would be ignored."""


@dataclass(frozen=True, slots=True)
class CachedProgram:
    """A program with a cache in a compute dtype.

    Attributes:
        program: See `vlmbuild.kv_cache.program`.
        bound: Its regions by name; those that need no change are the model's own.
    """

    program: Program
    bound: Mapping[str, RegionRunner]

    @classmethod
    def of(cls, model: VisionLanguageModel, form: CacheForm) -> CachedProgram:
        """Derive it. A compiler is to expect every size of a growing cache, and the same sizes again of a static one."""
        program = with_cache(model.program, form)
        bound = {
            name: model.bound[name]
            if form == "growing" and region is model.program.regions.get(name)
            else BoundRegion(region, model.dtype, (), one_token=form == "static")
            for name, region in program.regions.items()
        }
        return cls(program, bound)


@dataclass(frozen=True, slots=True)
class Decoding:
    """Some tokens on one model and cache.

    Attributes:
        model: Bound to weights.
        cache: Takes the tokens' keys and values.
        keep: Of how many tokens of every row logits are wanted; 0 is all.
        compiler: The callback of a surrounding `torch.compile`, or None.
    """

    model: VisionLanguageModel
    cache: KeyValueCache
    keep: int = 0
    compiler: Compiler = None

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Run a prompt, or the tokens after one.

        Args:
            batch: Of a prompt the processor's output; then `input_ids` (batch, new) and, if any token is padding,
                `attention_mask` (batch, past + new).

        Returns:
            (batch, kept tokens, vocabulary).

        Raises:
            BatchError: The batch contradicts itself, or the cache.
            UsageError: A static cache is full.
        """
        return self._prompt(batch) if self.cache.variant is None else self._step(batch)

    def _prompt(self, batch: Mapping[str, Tensor]) -> Tensor:
        cache = self.cache
        given = {name: tensor for name, tensor in batch.items() if tensor is not None}
        given |= {name: given[name][:: cache.copies] for name in ("input_ids", MASK) if name in given}
        prepared = self.model.family.prepare(given, self.model.config, self.model.processor)
        shape = given["input_ids"].shape
        variant = self.model.cached("growing").program.variants[prepared.variant]
        inputs = {name: tensor.to(self.model.device) for name, tensor in rectangle(prepared, variant, shape).items()}
        inputs[MASK] = whole_mask(given.get(MASK), shape[0], shape[1], self.model.device)
        logits, crossing = self._grow(prepared.variant, inputs)
        self._remember(prepared, inputs | crossing, STEP if crossing else "text")
        cache.media = media_shapes(self.model.family, given)
        if cache.copies > 1:
            cache.batch_repeat_interleave(cache.copies)
        return logits.repeat_interleave(cache.copies, 0)

    def _remember(self, prepared: PackedBatch, values: Mapping[str, Tensor], step: str) -> None:
        """What the tokens after a prompt take over from it."""
        self.cache.positions, last = (ends.to(self.model.device) for ends in row_ends(prepared, values[MASK].shape))
        self.cache.variant = step
        for entry in self.model.cached("growing").program.variants[step].inputs:
            if TOKENS not in entry.shape and not entry.name.startswith((PAST, MASK)):
                self.cache.images[entry.name] = values[entry.name]
            elif TOKENS in entry.shape and entry.name not in ("input_ids", "position_ids"):
                self.cache.rows[entry.name] = values[entry.name][last]

    def _step(self, batch: Mapping[str, Tensor]) -> Tensor:
        check_step(batch, self.model.family)
        cache, device = self.cache, self.model.device
        new, past = batch["input_ids"].shape[1], cache.get_seq_length()
        mask, positions = step_places(cache, batch, device)
        if batch["input_ids"].device.type == "cpu":  # elsewhere every step would wait for the look
            check_ids(batch["input_ids"], len(self.model.get_input_embeddings().weight))  # type: ignore[arg-type]
        ids = batch["input_ids"].to(device)
        values = {name: tensor.repeat_interleave(new, 0) for name, tensor in cache.rows.items()} | cache.images
        values |= {"input_ids": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1), MASK: mask}
        assert cache.variant is not None
        if cache.in_place and new == 1:
            logits = self._write(cache.variant, values, past)
        else:
            logits, _ = self._grow(cache.variant, values)
        cache.positions = cache.positions + mask[:, past:].sum(1)
        return logits

    def _grow(self, name: str, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, and what the variant returns besides the grown cache."""
        model, cache = self.model, self.cache
        batch, tokens = values[MASK].shape
        _check_room(cache, tokens)
        past = cache.past(batch, model.dtype, values[MASK].device)
        logits, presents = self._run("growing", name, values | past)
        cache.keep({name: presents.pop(present_name(name)) for name in past})
        return logits, presents

    def _write(self, name: str, values: dict[str, Tensor], past: int) -> Tensor:
        """One token of every row, into the cache's buffers."""
        _check_room(self.cache, past + 1)
        buffers = self.cache.buffers()
        length = next(iter(buffers.values())).shape[2]
        mask = torch.nn.functional.pad(values[MASK], (0, length - past - 1))
        position = torch.full((1,), past, device=mask.device)
        logits, _ = self._run("static", name, values | buffers | {MASK: mask, POSITION: position})
        self.cache.advance()
        return logits

    def _run(self, form: CacheForm, name: str, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits and the other values that a variant returns."""
        model, cached = self.model, self.model.cached(form)
        variant = cached.program.variants[name]
        check_same_variant(model, name)
        gather_unreached(model)
        rows = len(values[MASK])
        values = {entry.name: _as_input(values[entry.name], entry) for entry in variant.inputs}
        *calls, head = variant.calls

        def run(call: Call, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            bound = cached.bound[call.region]
            if not call.instance:
                return bound(model, self.compiler, arguments)
            results: tuple[Tensor, ...] = module_at(model, call.instance)(self.compiler, *arguments, bound=bound)
            return results

        run_calls(calls, values, run, keep=variant.presents)
        hidden = values[head.inputs[0]]
        hidden = hidden.view(rows, -1, hidden.shape[-1])[:, -self.keep :]
        (logits,) = run(head, (hidden.reshape(1, -1, hidden.shape[-1]),))
        return logits.view(*hidden.shape[:2], -1), {name: values[name] for name in variant.presents}


def rectangle(prepared: PackedBatch, variant: Variant, shape: torch.Size) -> dict[str, Tensor]:
    """A prepared batch with a row for every place of `input_ids`, of this shape; those of padding are zero, and nothing
    looks at them."""
    inputs = {}
    for entry in variant.inputs:
        tensor = prepared.tensors.get(entry.name)
        if tensor is not None and TOKENS in entry.shape and len(prepared.index) != shape.numel():
            axis = entry.shape.index(TOKENS)
            sizes = (*tensor.shape[:axis], shape.numel(), *tensor.shape[axis + 1 :])
            tensor = tensor.new_zeros(sizes).index_copy(axis, prepared.index.to(tensor.device), tensor)
        if tensor is not None:
            inputs[entry.name] = tensor
    return inputs


def row_ends(prepared: PackedBatch, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Of a prompt's rows: the position after the last token, and the last token's place in `input_ids` of this shape when
    rows stand one after another; int64 (batch,), on the CPU."""
    batch, length = shape
    samples, start = prepared.index // length, torch.full((batch,), -1)
    highest = prepared.tensors["position_ids"].flatten(0, -2).amax(0)
    return start.scatter_reduce(0, samples, highest, "amax") + 1, start.scatter_reduce(
        0, samples, prepared.index, "amax"
    )


def check_step(batch: Mapping[str, Tensor | None], family: Family) -> None:
    """Refuse what tokens that follow on a cache cannot bring along: it would not be looked at.

    Raises:
        BatchError: There is such a thing, or there are no tokens.
    """
    if batch.get("input_ids") is None:
        raise BatchError("There are no input_ids. A cache goes on with the tokens that follow.")
    prompts = {name for name, row in family.input_layout.items() if row != "token"} | _OF_PROMPTS
    if extra := sorted(name for name in prompts if batch.get(name) is not None):
        raise BatchError(
            f"{extra[0]} belongs to a prompt, and past_key_values holds one already. Pass the tokens that follow alone, or "
            "begin anew with the whole conversation and a new cache."
        )


def step_places(cache: KeyValueCache, batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The mask of all tokens, int64 (rows, past + new), and the positions of those that follow on a cache, (rows, new).

    Raises:
        BatchError: Rows or mask do not fit the cache.
    """
    (rows, new), past = batch["input_ids"].shape, cache.get_seq_length()
    if rows != len(cache.positions):
        raise BatchError(f"input_ids have {rows} rows, but the cache has {len(cache.positions)}.")
    mask = whole_mask(batch.get(MASK), rows, past + new, device)
    return mask, (cache.positions[:, None] + mask[:, past:].cumsum(1) - 1).clamp(min=0)


def whole_mask(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """int64 (batch, length), one at every token that is no padding.

    Raises:
        BatchError: The mask given has another shape.
    """
    if mask is None:
        return torch.ones(batch, length, dtype=torch.int64, device=device)
    if mask.shape != (batch, length):
        raise BatchError(
            f"attention_mask has shape {tuple(mask.shape)}, but with what the cache holds there are {batch} rows of {length} "
            "tokens. Pass the mask of all of them."
        )
    return mask.to(device).long()


def _check_room(cache: KeyValueCache, tokens: int) -> None:
    if cache.length is not None and tokens > cache.length:
        raise UsageError(
            f"The static cache has room for {cache.length} tokens, but there are {tokens}. Make a longer one: "
            "generate(..., max_cache_len=...) or new_cache(length)."
        )


def _as_input(tensor: Tensor, entry: Input) -> Tensor:
    """Positions are one number a token where they are made; every axis of the input gets it."""
    return tensor.expand(*entry.shape[:-1], -1) if tensor.ndim < len(entry.shape) else tensor  # type: ignore[arg-type]
