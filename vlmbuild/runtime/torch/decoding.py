"""Prompts and steps of a generation in torch: a model's program with a key-value cache, derived when it first generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.families import PackedBatch
from vlmbuild.ir.interpret import run_calls
from vlmbuild.ir.program import Call, Input
from vlmbuild.kv_cache.block import CacheForm
from vlmbuild.kv_cache.program import CROSS, MASK, PAST, POSITION, STEP, TOKENS, present_name
from vlmbuild.runtime.compiler import Compiler
from vlmbuild.runtime.decode_steps import DecodeSteps, PromptResult, unpack_to_padded
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.torch.program_model import ProgramModel
from vlmbuild.runtime.torch.sharding import check_same_variant, gather_unreached


@dataclass(frozen=True)
class Decoding(DecodeSteps[ProgramModel]):
    """Runs tokens on a model in torch.

    Attributes:
        compiler: Callback of a surrounding `torch.compile`, or None.
    """

    compiler: Compiler = None

    def run_prompt(self, batch: Mapping[str, Any], prepared: PackedBatch, mask: Tensor) -> PromptResult:
        variants = self.model.cached("dynamic").program.variants
        inputs = unpack_to_padded(prepared, variants[prepared.variant], mask.shape)
        values = {name: tensor.to(self.model.device) for name, tensor in inputs.items()} | {MASK: mask}
        logits, crossing = self._append(prepared.variant, dict(values))
        values |= crossing
        step = STEP if crossing else "text"
        images: dict[str, Tensor] = {}
        tokens: dict[str, Tensor] = {}
        for entry in variants[step].inputs:
            if TOKENS not in entry.shape and not entry.name.startswith((PAST, MASK)):
                images[entry.name] = values[entry.name]
            elif TOKENS in entry.shape and entry.name not in ("input_ids", "position_ids"):
                tokens[entry.name] = values[entry.name]
        return PromptResult(logits, step, images, tokens)

    def run_step(self, variant: str, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        cache, new = self.cache, ids.shape[1]
        images = {
            name: tensor.to(self._dtype()) if name.startswith(CROSS) else tensor
            for name, tensor in cache.images.items()
        }
        values = {name: tensor.repeat_interleave(new, 0) for name, tensor in cache.rows.items()} | images
        values |= {"input_ids": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1), MASK: mask}
        if cache.in_place and new == 1:
            return self._write(variant, values)
        return self._append(variant, values)[0]

    def _append(self, name: str, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Run tokens with the cache so far as an input; return logits, and results other than keys and values."""
        cache = self.cache
        batch, tokens = values[MASK].shape
        _check_room(cache, tokens)
        dtype = self._dtype()
        past = cache.past(batch, dtype, values[MASK].device)
        logits, presents = self._run("dynamic", name, values | past)
        # a key's norm returns float32 under autocast
        cache.keep({name: presents.pop(present_name(name)).to(dtype) for name in past})
        return logits, presents

    def _write(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """Run one token per row, writing into the cache's buffers."""
        past = self.cache.get_seq_length()
        _check_room(self.cache, past + 1)
        self.cache.convert(self._dtype())
        buffers = self.cache.buffers()
        length = next(iter(buffers.values())).shape[2]
        mask = torch.nn.functional.pad(values[MASK], (0, length - past - 1))
        position = torch.full((1,), past, device=mask.device)
        logits, _ = self._run("static", name, values | buffers | {MASK: mask, POSITION: position})
        self.cache.advance()
        return logits

    def _dtype(self) -> torch.dtype:
        """Return the dtype of keys and values: autocast's, where a model in float32 runs under it."""
        kind = self.model.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.dtype

    def _run(self, form: CacheForm, name: str, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and a variant's other results."""
        model, cached = self.model, self.model.cached(form)
        variant = cached.program.variants[name]
        check_same_variant(model, name)
        gather_unreached(model)
        rows = len(values[MASK])
        values = {entry.name: _as_input(values[entry.name], entry) for entry in variant.inputs}
        *calls, head = variant.calls

        def embed(ids: Tensor, padding_idx: int) -> Tensor:
            embeddings: Tensor = model.get_input_embeddings()(ids.view(rows, -1), padding_idx=padding_idx)
            return embeddings.flatten(0, 1).unsqueeze(0)

        def run(call: Call, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return model.run_call(call, cached.bound[call.region], self.compiler, arguments, embed)

        run_calls(calls, values, run, keep=variant.presents)
        hidden = values[head.inputs[0]]
        hidden = hidden.view(rows, -1, hidden.shape[-1])[:, -self.keep :]

        def logits_of(states: Tensor) -> Tensor:
            (logits,) = run(head, (states.reshape(1, -1, states.shape[-1]),))
            return logits.view(*states.shape[:2], -1)

        module = model.get_output_embeddings()
        logits = module(hidden, run=logits_of) if module.has_hooks else logits_of(hidden)
        return logits, {name: values[name] for name in variant.presents}


def _check_room(cache: KeyValueCache, tokens: int) -> None:
    if cache.length is not None and tokens > cache.length:
        raise UsageError(
            f"The static cache has room for {cache.length} tokens, but there are {tokens}. Pass a larger max_cache_len to "
            "generate, or a larger length to new_cache."
        )


def _as_input(tensor: Tensor, entry: Input) -> Tensor:
    """Repeat positions, computed as one number per token, for every axis of the input."""
    return tensor.expand(*entry.shape[:-1], -1) if tensor.ndim < len(entry.shape) else tensor  # type: ignore[arg-type]
