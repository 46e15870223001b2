"""Prompts and steps of a generation on the ONNX models of an artifact."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.families import PackedBatch
from vlmbuild.ir.dims import Dim
from vlmbuild.ir.program import Input
from vlmbuild.kv_cache.program import MASK, PAST, present_name
from vlmbuild.runtime.decode_steps import DecodeSteps, PromptResult, padded_rows
from vlmbuild.runtime.onnx.session import FOLDER, OnnxSession, open_session

VISION, EMBED, DECODER, TEXT_DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged", "decoder_text"
Q4 = "_q4"
"""End of all stems where weights are in int4: transformers.js derives the names of files from its `dtype`."""
FEATURES, EMBEDS, LOGITS, KEEP = "image_features", "inputs_embeds", "logits", "num_logits_to_keep"
POSITIONS = "position_ids"
_ROWS = (Dim.named("batch_size"), Dim.named("sequence_length"))
_FEATURE_INDEX = "feature_index"
"""Tensor of the host prologue: the image feature that replaces each token's embedding, -1 for none."""


@dataclass(frozen=True, slots=True)
class OnnxModels:
    """The models of an artifact.

    Attributes:
        vision, embed, decoder: Models for a batch with images.
        text: Decoder for a batch without images; None where it is the same.
    """

    vision: OnnxSession
    embed: OnnxSession
    decoder: OnnxSession
    text: OnnxSession | None = None

    @classmethod
    def open(
        cls, directory: Path, device: str = "cpu", *, economical: Collection[str] = (), folder: str | None = None
    ) -> OnnxModels:
        """Open all models; stems in `economical` take less memory. Options and errors are those of `open_session`."""
        suffix = Q4 if (directory / FOLDER / f"{DECODER}{Q4}.onnx").is_file() else ""
        stems = [f"{stem}{suffix}" for stem in (VISION, EMBED, DECODER)]
        if (directory / FOLDER / f"{TEXT_DECODER}{suffix}.onnx").is_file():
            stems.append(f"{TEXT_DECODER}{suffix}")
        return cls(
            *(open_session(directory, stem, device, economical=stem in economical, folder=folder) for stem in stems)
        )

    def decoder_of(self, variant: str) -> OnnxSession:
        """Return the decoder for a variant of the program."""
        return self.text if variant == "text" and self.text is not None else self.decoder

    def cached(self) -> tuple[Input, ...]:
        """Return the decoder's cached keys and values, in pairs."""
        return tuple(entry for entry in self.decoder.inputs if entry.name.startswith(f"{PAST}."))


class OnnxDecoding(DecodeSteps[Any]):
    """Runs tokens on an artifact's models."""

    @property
    def models(self) -> OnnxModels:
        """The models of the artifact."""
        models: OnnxModels = self.model.models
        return models

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        return super().logits({name: x.cpu() if isinstance(x, Tensor) else x for name, x in batch.items()})

    def image_values(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the vision encoder's results for a processor's images; nothing without images."""
        model = self.model
        return self._encoded(batch, model.family.prepare(batch, model.config, model.processor))

    def run_prompt(self, batch: Mapping[str, Any], prepared: PackedBatch, mask: Tensor) -> PromptResult:
        session = self.models.decoder_of(prepared.variant)
        images = self._images(batch, prepared)
        embeds = self._embed(batch["input_ids"])
        if FEATURES in images:
            embeds = _with_features(embeds, images.pop(FEATURES), prepared)
        rows = _rows_by_token(prepared, session.inputs, mask.shape)
        logits = self._run(session, rows | images | {MASK: mask, EMBEDS: embeds})
        carried = [
            entry
            for entry in session.inputs
            if entry.name != POSITIONS and not entry.name.startswith((PAST, MASK, EMBEDS, KEEP))
        ]
        return PromptResult(
            logits,
            prepared.variant,
            {entry.name: images[entry.name] for entry in carried if not _is_by_token(entry)},
            {entry.name: rows[entry.name].flatten(0, 1) for entry in carried if _is_by_token(entry)},
        )

    def run_step(self, variant: str, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        session = self.models.decoder_of(variant)
        axes = next(len(entry.shape) for entry in session.inputs if entry.name == POSITIONS)
        rows = {name: x.unsqueeze(1).expand(-1, ids.shape[1], *x.shape[1:]) for name, x in self.cache.rows.items()}
        values = rows | self.cache.images | {EMBEDS: self._embed(ids), MASK: mask}
        return self._run(session, values | {POSITIONS: positions.expand(3, -1, -1) if axes == 3 else positions})

    def _encoded(self, batch: Mapping[str, Any], prepared: PackedBatch) -> dict[str, Tensor]:
        if prepared.variant == "text":
            return {}
        client = self.model.family.client_batch(batch)
        if client is None:
            return self.models.vision.run(prepared.tensors)
        encoded, order = self.models.vision.run(client), prepared.feature_order
        if order is not None:  # clients get features in the order of images
            features = encoded[FEATURES]
            encoded[FEATURES] = features[order[order < len(features)]]
        return encoded

    def _images(self, batch: Mapping[str, Any], prepared: PackedBatch) -> dict[str, Tensor]:
        """Return all decoder inputs that depend on images; nothing without images."""
        encoded = self._encoded(batch, prepared)
        if not encoded:
            return {}
        names = {entry.name for entry in self.models.decoder.inputs if not _is_by_token(entry)}
        return encoded | {name: tensor for name, tensor in prepared.tensors.items() if name in names}

    def _embed(self, ids: Tensor) -> Tensor:
        return self.models.embed.run({"input_ids": ids})[EMBEDS]

    def _run(self, session: OnnxSession, values: dict[str, Tensor]) -> Tensor:
        past = self.cache.past(len(values[MASK]), values[EMBEDS].dtype, values[MASK].device)
        results = session.run(values | past | {KEEP: torch.tensor(self.keep)})
        self.cache.keep({name: results[present_name(name)] for name in past})
        return results[LOGITS]


def _is_by_token(entry: Input) -> bool:
    """Return whether an input has a row for every token."""
    return any(entry.shape[axis : axis + 2] == _ROWS for axis in range(len(entry.shape)))


def _with_features(embeds: Tensor, features: Tensor, prepared: PackedBatch) -> Tensor:
    """Return embeddings (batch, sequence, hidden) with image features at their tokens."""
    flat = embeds.flatten(0, 1).clone()
    index = prepared.tensors[_FEATURE_INDEX].flatten()
    shown = index >= 0
    flat[prepared.index[shown]] = features[index[shown]].to(flat.dtype)
    return flat.view(embeds.shape)


def _rows_by_token(prepared: PackedBatch, inputs: tuple[Input, ...], shape: torch.Size) -> dict[str, Tensor]:
    """Return the prepared inputs with a row per token as (batch, sequence) rows; rows of padding are zero."""
    rows = {}
    for entry in inputs:
        tensor = prepared.tensors.get(entry.name)
        if tensor is None or not _is_by_token(entry):
            continue
        axis = entry.shape.index(_ROWS[0])
        trailing = tensor.shape[tensor.ndim - (len(entry.shape) - axis - 2) :]
        packed = tensor.reshape(*tensor.shape[:axis], len(prepared.index), *trailing)
        rows[entry.name] = padded_rows(packed, prepared, axis, shape).unflatten(axis, tuple(shape))
    return rows
