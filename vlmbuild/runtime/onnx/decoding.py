"""Run prompts and steps of a generation on the ONNX models of an artifact."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.families import Family, PackedBatch, check_ids
from vlmbuild.ir.program import Input
from vlmbuild.kv_cache.program import MASK, PAST, present_name
from vlmbuild.runtime.generation import media_shapes
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.onnx.session import FOLDER, OnnxSession, open_session
from vlmbuild.runtime.torch.decoding import check_step, row_ends, step_places, whole_mask

VISION, EMBED, DECODER, TEXT_DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged", "decoder_text"
FEATURES, EMBEDS, LOGITS, KEEP = "image_features", "inputs_embeds", "logits", "num_logits_to_keep"
_ROWS = ("batch_size", "sequence_length")
_PLACES = "feature_index"
"""Of the host prologue: which image feature takes the place of a token's embedding, -1 for none."""


@dataclass(frozen=True, slots=True)
class OnnxModels:
    """The models of an artifact.

    Attributes:
        vision, embed, decoder: Of a batch with images.
        text: The decoder of a batch without; None where it is the same.
    """

    vision: OnnxSession
    embed: OnnxSession
    decoder: OnnxSession
    text: OnnxSession | None = None

    @classmethod
    def open(cls, directory: Path, device: str = "cpu", *, economical: Collection[str] = ()) -> OnnxModels:
        """Open all, those of the stems `economical` so. Raises what `open_session` raises."""
        stems = [VISION, EMBED, DECODER]
        if (directory / FOLDER / f"{TEXT_DECODER}.onnx").is_file():
            stems.append(TEXT_DECODER)
        return cls(*(open_session(directory, stem, device, economical=stem in economical) for stem in stems))

    def decoder_of(self, variant: str) -> OnnxSession:
        """The decoder for a batch of this kind."""
        return self.text if variant == "text" and self.text is not None else self.decoder

    def cached(self) -> tuple[Input, ...]:
        """The decoder's cached keys and values, in pairs."""
        return tuple(entry for entry in self.decoder.inputs if entry.name.startswith(f"{PAST}."))


@dataclass(frozen=True, slots=True)
class OnnxDecoding:
    """Some tokens on one set of models and one cache.

    Attributes:
        models: Of an artifact.
        family, config, processor: Of its model.
        cache: Takes the tokens' keys and values.
        keep: Of how many tokens of every row logits are wanted; 0 is all.
    """

    models: OnnxModels
    family: Family
    config: Any
    processor: Any
    cache: KeyValueCache
    keep: int = 0

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Run a prompt, the processor's output, or the tokens after one: (batch, kept tokens, vocabulary).

        Raises:
            BatchError: The batch contradicts itself, or the cache.
        """
        return self._prompt(batch) if self.cache.variant is None else self._step(batch)

    def _prompt(self, batch: Mapping[str, Tensor]) -> Tensor:
        cache = self.cache
        given = {name: tensor.cpu() for name, tensor in batch.items() if isinstance(tensor, Tensor)}
        given |= {name: given[name][:: cache.copies] for name in ("input_ids", MASK) if name in given}
        prepared = self.family.prepare(given, self.config, self.processor)
        ids = given["input_ids"]
        session = self.models.decoder_of(prepared.variant)
        images = self._images(given, prepared)
        embeds = self._embed(ids)
        if FEATURES in images:
            embeds = _placed(embeds, images.pop(FEATURES), prepared)
        values = _by_rows(prepared, session.inputs, ids.shape) | images
        values |= {MASK: whole_mask(given.get(MASK), ids.shape[0], ids.shape[1], ids.device), EMBEDS: embeds}
        logits = self._run(session, values)
        self._remember(prepared, session, values, ids.shape)
        cache.media = media_shapes(self.family, given)
        if cache.copies > 1:
            cache.batch_repeat_interleave(cache.copies)
        return logits.repeat_interleave(cache.copies, 0)

    def image_values(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the vision encoder makes of a processor's images; nothing of none."""
        return self._encoded(batch, self.family.prepare(batch, self.config, self.processor))

    def _encoded(self, given: Mapping[str, Tensor], prepared: PackedBatch) -> dict[str, Tensor]:
        if prepared.variant == "text":
            return {}
        client = self.family.client_batch(given)
        return self.models.vision.run(prepared.tensors if client is None else client)

    def _images(self, given: Mapping[str, Tensor], prepared: PackedBatch) -> dict[str, Tensor]:
        """What the tokens read of the images; nothing without images."""
        found = self._encoded(given, prepared)
        if not found:
            return {}
        read = {entry.name for entry in self.models.decoder.inputs}
        return found | {
            name: tensor for name, tensor in prepared.tensors.items() if name in read - _by_token(self.models)
        }

    def _embed(self, ids: Tensor) -> Tensor:
        return self.models.embed.run({"input_ids": ids})[EMBEDS]

    def _remember(
        self, prepared: PackedBatch, session: OnnxSession, values: Mapping[str, Tensor], shape: torch.Size
    ) -> None:
        """What the tokens after a prompt take over from it."""
        self.cache.positions, last = row_ends(prepared, shape)
        self.cache.variant = prepared.variant
        for entry in session.inputs:
            if entry.name.startswith((PAST, MASK, EMBEDS, KEEP)) or entry.name == "position_ids":
                continue
            if _is_by_token(entry):
                self.cache.rows[entry.name] = values[entry.name].flatten(0, 1)[last]
            else:
                self.cache.images[entry.name] = values[entry.name]

    def _step(self, batch: Mapping[str, Tensor]) -> Tensor:
        check_step(batch, self.family)
        cache, ids = self.cache, batch["input_ids"].cpu()
        new, past = ids.shape[1], cache.get_seq_length()
        mask, positions = step_places(cache, batch, ids.device)
        check_ids(ids, self.config.get_text_config().vocab_size + self.family.extra_embedding_rows)
        session = self.models.decoder_of(cache.variant or "")
        axes = next(len(entry.shape) for entry in session.inputs if entry.name == "position_ids")
        values = {name: x.unsqueeze(1).expand(-1, new, *x.shape[1:]) for name, x in cache.rows.items()} | cache.images
        values |= {
            EMBEDS: self._embed(ids),
            MASK: mask,
            "position_ids": positions.expand(3, -1, -1) if axes == 3 else positions,
        }
        logits = self._run(session, values)
        cache.positions = cache.positions + mask[:, past:].sum(1)
        return logits

    def _run(self, session: OnnxSession, values: dict[str, Tensor]) -> Tensor:
        past = self.cache.past(len(values[MASK]), values[EMBEDS].dtype, values[MASK].device)
        found = session.run(values | past | {KEEP: torch.tensor(self.keep)})
        self.cache.keep({name: found[present_name(name)] for name in past})
        return found[LOGITS]


def _is_by_token(entry: Input) -> bool:
    """Whether an input has a row for every token."""
    return any(entry.shape[axis : axis + 2] == _ROWS for axis in range(len(entry.shape)))


def _by_token(models: OnnxModels) -> set[str]:
    return {entry.name for entry in models.decoder.inputs if _is_by_token(entry)}


def _placed(embeds: Tensor, features: Tensor, prepared: PackedBatch) -> Tensor:
    """Embeddings (batch, sequence, hidden) with the features of images in their places."""
    flat = embeds.flatten(0, 1).clone()
    index = prepared.tensors[_PLACES].flatten()
    shown = index >= 0
    flat[prepared.index[shown]] = features[index[shown]].to(flat.dtype)
    return flat.view(embeds.shape)


def _by_rows(prepared: PackedBatch, inputs: tuple[Input, ...], shape: torch.Size) -> dict[str, Tensor]:
    """The prepared inputs that have a row for every token, as (batch, sequence) rows; those of padding are zero."""
    found = {}
    for entry in inputs:
        tensor = prepared.tensors.get(entry.name)
        if tensor is None or not _is_by_token(entry):
            continue
        before = entry.shape.index(_ROWS[0])
        packed = tensor.reshape(*tensor.shape[:before], len(prepared.index), *_behind(tensor, before, entry))
        whole = packed.new_zeros((*packed.shape[:before], shape.numel(), *packed.shape[before + 1 :]))
        whole = whole.index_copy(before, prepared.index, packed)
        found[entry.name] = whole.unflatten(before, tuple(shape))
    return found


def _behind(tensor: Tensor, before: int, entry: Input) -> tuple[int, ...]:
    """The sizes behind the tokens'."""
    return tuple(tensor.shape[tensor.ndim - (len(entry.shape) - before - 2) :])
