"""Packing of a batch for the graph: the tokens of all samples in one row, and what every family checks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmbuild.errors import BatchError
from vlmbuild.families.base import ImageCost

_NOT_TAKEN = ("position_ids", "inputs_embeds", "past_key_values")


@dataclass(frozen=True, slots=True)
class Tokens:
    """The text of a batch.

    Attributes:
        ids: (batch, sequence).
        mask: bool (batch, sequence), on the CPU: which tokens are attended to.
        index: int64 (tokens,), on the CPU: where each packed token stands in the flattened ids.
    """

    ids: Tensor
    mask: Tensor
    index: Tensor

    def pack(self, values: Tensor) -> Tensor:
        """The rows (batch, sequence, ...) of attended tokens: (tokens, ...)."""
        return values.flatten(0, 1)[self.index.to(values.device)]

    def positions(self) -> Tensor:
        """Place of every token in its own sample, without padding: int64 (1, tokens)."""
        return self.pack(self.mask.long().cumsum(1) - 1).unsqueeze(0)

    def samples(self) -> Tensor:
        """The sample of every token: int64 (tokens,)."""
        return self.index // self.ids.shape[1]

    def inputs(self, position_ids: Tensor) -> dict[str, Tensor]:
        """The inputs of a variant that are about text."""
        return {
            "input_ids": self.pack(self.ids).unsqueeze(0),
            "position_ids": position_ids,
            "text_cu_seqlens": cumulative_bounds(self.mask.sum(1)),
        }


def read_tokens(batch: Mapping[str, Tensor], special: Mapping[int, str], vocabulary: int) -> Tokens:
    """The text of a processor's output, after the checks that hold for every family.

    Args:
        batch: `input_ids` (b, s), optionally `attention_mask` (b, s) and `labels` (b, s).
        special: Ids of tokens that stand for media, and what to call them; they are never labels.
        vocabulary: Rows of the embeddings.

    Raises:
        BatchError: A tensor is missing or of the wrong shape, nothing is attended to, or a label is a special token.
    """
    for key in _NOT_TAKEN:
        if batch.get(key) is not None:
            raise BatchError(
                f"{key} is not supported: positions and embeddings are computed from input_ids and the images."
            )
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise BatchError(
            "The batch has no input_ids of shape (batch, sequence); call the model with the processor's output, made "
            'with return_tensors="pt".'
        )
    check_ids(ids, vocabulary)
    for key in ("attention_mask", "labels"):
        _check_like(key, batch.get(key), ids)
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not mask.any():
        raise BatchError("The batch attends to no token at all: attention_mask is zero everywhere.")
    _check_labels(batch.get("labels"), special)
    mask = mask.cpu()
    return Tokens(ids, mask, mask.flatten().nonzero().squeeze(1))


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise BatchError unless there are embeddings for all ids (batch, sequence)."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise BatchError(f"input_ids are {ids.dtype}; token ids are integers.")
    wrong = ((ids < 0) | (ids >= vocabulary)).any(1).cpu()
    if wrong.any():
        sample = int(wrong.int().argmax())
        raise BatchError(
            f"Sample {sample} has token ids from {int(ids[sample].min())} to {int(ids[sample].max())}, but the model has "
            f"embeddings for 0 to {vocabulary - 1}. Use the model's own tokenizer, without added tokens."
        )


def _check_like(key: str, values: object, ids: Tensor) -> None:
    if values is None:
        return
    if not isinstance(values, Tensor):
        raise BatchError(
            f'{key} must be a tensor, not {type(values).__name__}; use the processor with return_tensors="pt".'
        )
    if values.shape != ids.shape:
        raise BatchError(f"{key} has shape {tuple(values.shape)}, input_ids {tuple(ids.shape)}; they must be equal.")


def _check_labels(labels: Tensor | None, special: Mapping[int, str]) -> None:
    if labels is None:
        return
    for token, name in special.items():
        wrong = (labels == token).sum(1).cpu()
        if wrong.any():
            sample = int(wrong.argmax())
            raise BatchError(
                f"Sample {sample}: {int(wrong[sample])} labels are the {name} token ({token}), which a model reads and "
                f"never writes. Set the labels of such tokens to -100: labels[labels == {token}] = -100."
            )


def cumulative_bounds(lengths: Tensor) -> Tensor:
    """Bounds of packed sequences (`cu_seqlens`, int32): 0, the ends, and the last end again.

    The repetition is an empty sequence. With it there are never fewer than three bounds, and one sequence is no special
    case that a compiler would specialise.
    """
    ends = lengths.cumsum(0)
    return torch.cat([ends.new_zeros(1), ends, ends[-1:]]).to(torch.int32)


def packed_sizes(images: Sequence[ImageCost], batch: int, text_tokens: int) -> dict[str, int]:
    """The sizes of packed text and packed patches; see `Family.batch_sizes`. Bounds are one more than what they bound, and
    `cumulative_bounds` repeats the last."""
    return {
        "sequence": batch * (text_tokens + sum(image.tokens for image in images)),
        "samples": batch + 2,
        "patches": batch * sum(image.patches for image in images),
        "segments": batch * len(images) + 2,
    }


def cut_patches(pixels: Tensor, patch: int) -> Tensor:
    """The square patches of images (..., channels, height, width), row by row: (patches, channels * patch * patch)."""
    tiles = (
        pixels.float().unfold(-2, patch, patch).unfold(-2, patch, patch)
    )  # (..., channels, rows, columns, patch, patch)
    return tiles.movedim(-5, -3).reshape(-1, pixels.shape[-3] * patch * patch)


def with_spare_feature(image: dict[str, Tensor], patches: int) -> dict[str, Tensor]:
    """A batch whose images have a single feature gets a second one, which no token reads: a size of one would be a special
    case to the compiler, and cost a compilation.

    Args:
        image: `pixel_values` (n, pixels), `vision_position_ids` (n, axes), `vision_cu_seqlens`, and others.
        patches: A feature's patches.
    """
    pixels, positions, bounds = image["pixel_values"], image["vision_position_ids"], image["vision_cu_seqlens"]
    if len(pixels) > patches:
        return image
    return image | {
        "pixel_values": torch.cat([pixels, torch.zeros_like(pixels)]),
        "vision_position_ids": torch.cat([positions, positions]),
        "vision_cu_seqlens": torch.cat([bounds[:-1], bounds[-1:] + patches]),
    }
