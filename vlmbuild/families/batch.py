"""Packing of a batch for the graph: the tokens of all samples in one row, and the checks that every family makes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmbuild.errors import BatchError

_IGNORED = -100
_REFUSED = ("position_ids", "inputs_embeds", "past_key_values")


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch after the host prologue, packed: the tokens of all samples in one row, without padding.

    Attributes:
        variant: Name of the program's variant that runs it.
        tensors: Inputs of that variant.
        index: int64 (tokens,): index of each packed token in the flattened (batch, sequence) input ids.
        feature_order: int64 (features,): numbers of the features of the images as the vision tower orders them; None where
            it keeps their order.
    """

    variant: str
    tensors: dict[str, Tensor]
    index: Tensor
    feature_order: Tensor | None = None


class ImageCost(NamedTuple):
    """The cost of an image: rows of the vision tower (padding included), tokens in the sequence, keys of cross-attention,
    segments within which the tower attends."""

    patches: int
    tokens: int
    cross_keys: int = 0
    segments: int = 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """The text of a batch.

    Attributes:
        ids: (batch, sequence).
        mask: bool (batch, sequence), on the CPU: attended tokens.
        index: int64 (tokens,), on the CPU: index of each packed token in the flattened ids.
    """

    ids: Tensor
    mask: Tensor
    index: Tensor

    def pack(self, values: Tensor) -> Tensor:
        """Select the rows of attended tokens: (batch, sequence, ...) -> (tokens, ...)."""
        return values.flatten(0, 1)[self.index.to(values.device)]

    def positions(self) -> Tensor:
        """Number the tokens of every sample, without padding: int64 (1, tokens)."""
        return self.pack(self.mask.long().cumsum(1) - 1).unsqueeze(0)

    def samples(self) -> Tensor:
        """Name the sample of every token: int64 (tokens,)."""
        return self.index // self.ids.shape[1]

    def inputs(self, position_ids: Tensor) -> dict[str, Tensor]:
        """Make the text inputs of a variant."""
        return {
            "input_ids": self.pack(self.ids).unsqueeze(0),
            "position_ids": position_ids,
            "text_cu_seqlens": repeat_end(torch.nn.functional.pad(self.mask.sum(1).cumsum(0), (1, 0))),
        }


def read_tokens(
    batch: Mapping[str, Tensor], placeholders: Mapping[int, str], vocabulary: int, logits: int | None = None
) -> Tokens:
    """Read the text of a processor's output.

    Args:
        batch: `input_ids` (b, s), optionally `attention_mask` (b, s) and `labels` (b, s).
        placeholders: Token ids that mark images and videos -> "image" or "video"; they are never labels.
        vocabulary: Rows of the embedding table.
        logits: Logits of a token; None is one for each row.

    Raises:
        BatchError: A tensor is missing or has a wrong shape, no token is attended to, or a label is a placeholder, lies on
            padding, or is no token.
    """
    for key in _REFUSED:
        if batch.get(key) is not None:
            raise BatchError(f"{key} is not supported: it is computed from input_ids and the images. Leave it out.")
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise BatchError(
            "The batch has no input_ids of shape (batch, sequence). Call the model with the processor's output, made with "
            'return_tensors="pt".'
        )
    check_ids(ids, vocabulary)
    for key in ("attention_mask", "labels"):
        _check_like(key, batch.get(key), ids)
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not mask.any():
        raise BatchError(
            "The batch attends to no token: attention_mask is zero everywhere. Pass the processor's own mask."
        )
    mask = mask.cpu()
    if (labels := batch.get("labels")) is not None:
        _check_placeholder_labels(labels, placeholders)
        _check_labels(labels, mask, logits or vocabulary)
    return Tokens(ids, mask, mask.flatten().nonzero().squeeze(1))


def refuse_gaps(tokens: Tokens, config: Any) -> None:
    """Raise BatchError for padding between the tokens of a sample, where a sliding window is counted with it in transformers
    and without it here."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    starts = torch.nn.functional.pad(tokens.mask, (1, 0))
    gaps = (starts[:, 1:] & ~starts[:, :-1]).sum(1) > 1
    if window is not None and gaps.any():
        raise BatchError(
            f"Sample {int(gaps.int().argmax())}: attention_mask is 0 between tokens, and windows of {window} tokens would be "
            "counted otherwise than in transformers. Pad at the ends only."
        )


def block_lookahead(blocks: Tensor) -> Tensor:
    """Count the tokens after each one in its block, which it sees too (`vlmbuild.ops.attention.op.Masks.lookahead`): int32
    (tokens,).

    Args:
        blocks: Integers (tokens,), packed: the number of every token's block, -1 for tokens that see the past alone.
            Neighbouring blocks have different numbers.
    """
    _, run, lengths = blocks.unique_consecutive(return_inverse=True, return_counts=True)
    after = lengths.cumsum(0)[run] - torch.arange(len(blocks)) - 1
    return torch.where(blocks >= 0, after, 0).to(torch.int32)


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise BatchError unless every id (batch, sequence) has an embedding."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise BatchError(f"input_ids are {ids.dtype}; token ids are integers. Pass the tokenizer's ids.")
    wrong = ((ids < 0) | (ids >= vocabulary)).any(1).cpu()
    if wrong.any():
        sample = int(wrong.int().argmax())
        raise BatchError(
            f"Sample {sample} has token ids from {int(ids[sample].min())} to {int(ids[sample].max())}, but the model has "
            f"embeddings for 0 to {vocabulary - 1}. Use the model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer)) of a trainable model for added tokens."
        )


def _check_like(key: str, values: object, ids: Tensor) -> None:
    if values is None:
        return
    if not isinstance(values, Tensor):
        raise BatchError(
            f'{key} must be a tensor, not {type(values).__name__}. Use the processor with return_tensors="pt".'
        )
    if values.shape != ids.shape:
        raise BatchError(
            f"{key} has shape {tuple(values.shape)}, input_ids {tuple(ids.shape)}. Cut and pad them together."
        )


def _check_labels(labels: Tensor, mask: Tensor, vocabulary: int) -> None:
    """Raise BatchError for labels that transformers learns or fails on and this package leaves out; warn of first tokens."""
    labels = labels.cpu()
    chosen = labels != _IGNORED
    if (chosen[:, 1:] & mask[:, 1:] & ~mask[:, :-1]).any():
        warnings.warn(
            "Labels directly behind padding on the left are left out, while transformers predicts them from the padding. Set "
            "them to -100 for equal losses: labels[:, 1:][attention_mask[:, :-1] == 0] = -100.",
            stacklevel=2,
        )
    for wrong, fault, remedy in (
        (
            chosen & ~mask,
            "labels are on padding (attention_mask is 0 there)",
            "Set them to -100: labels[attention_mask == 0] = -100",
        ),
        (
            chosen & ((labels < 0) | (labels >= vocabulary)),
            f"labels are no token ids from 0 to {vocabulary - 1}, and not -100",
            "Set labels to leave out to -100",
        ),
    ):
        if wrong.any():
            sample = int(wrong.any(1).int().argmax())
            raise BatchError(f"Sample {sample}: {int(wrong[sample].sum())} {fault}. {remedy}.")


def _check_placeholder_labels(labels: Tensor, placeholders: Mapping[int, str]) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise BatchError(
            f"labels are {labels.dtype}; they are token ids. Pass integers, and -100 for tokens to leave out."
        )
    for token, kind in placeholders.items():
        wrong = (labels == token).sum(1).cpu()
        if wrong.any():
            sample = int(wrong.argmax())
            raise BatchError(
                f"Sample {sample}: {int(wrong[sample])} labels are the {kind} token ({token}), which a model reads and "
                f"never writes. Set the labels of such tokens to -100: labels[labels == {token}] = -100."
            )


def repeat_end(bounds: Tensor) -> Tensor:
    """Repeat the last bound of packed sequences (`cu_seqlens`), as int32.

    The repetition is an empty sequence. With it there are never fewer than three bounds, and one sequence is no special
    case that a compiler would specialise.
    """
    return torch.cat([bounds, bounds[-1:]]).to(torch.int32)


def cut_patches(pixels: Tensor, patch: int) -> Tensor:
    """Cut images (..., channels, height, width) into square patches, row by row: (patches, channels * patch * patch)."""
    rows = pixels.float().unfold(-2, patch, patch)
    patches = rows.unfold(-2, patch, patch)  # (..., channels, rows, columns, patch, patch)
    return patches.movedim(-5, -3).reshape(-1, pixels.shape[-3] * patch * patch)
