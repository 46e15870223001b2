"""Collator from chat samples with images to a batch with labels, on responses only, without cutting images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.image_utils import SizeDict

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families import family_of_processor
from vlmbuild.runtime.torch.loss import IGNORED
from vlmbuild.train.conversation import Conversation, read_conversation
from vlmbuild.train.images import image_size, open_image
from vlmbuild.train.render import render
from vlmbuild.util.validation import one_of


class Measure(NamedTuple):
    """The cost of a sample.

    Attributes:
        tokens: Tokens, including its images', after truncation to `max_length`.
        images: Number of images.
        fits: True if all its images and the beginning of a response fit into `max_length`.
    """

    tokens: int
    images: int
    fits: bool


@dataclass(frozen=True, slots=True)
class _Sample:
    """A rendered conversation; its tokens, with one per image, and which of them are labels."""

    conversation: Conversation
    text: str
    ids: Tensor
    learned: Tensor


class VisionDataCollator:
    """Batches for `model(**batch)`, for transformers' and TRL's trainers and for a DataLoader (it can be pickled).

    Args:
        processor: Processor of the model; `vlmbuild.load` returns it.
        max_length: Most tokens of a sample, including its images'. Longer ones lose their end, but never a part of an image.
        responses_only: Labels are the assistant's responses, with the token that ends the turn; otherwise all text. Tokens of
            images, videos and padding are never labels.
        padding_side: "right" or "left".
        overlong: Treatment of a sample whose images, or first response, lie beyond `max_length`: "error", or "drop" with a
            warning that counts.
        size: Lower limits for images than the processor's own, in the same terms: {"longest_edge": pixels}.
        template_options: Further values for the chat template, for example {"add_vision_id": True}, or {"date_string": ...}
            for a template that writes today's date.

    Raises:
        UsageError: The processor is none, has no chat template or no padding token, or an option is not valid.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        responses_only: bool = True,
        padding_side: Literal["right", "left"] = "right",
        overlong: Literal["error", "drop"] = "error",
        size: Mapping[str, int] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.family = family_of_processor(processor)
        one_of("padding_side", padding_side, ("right", "left"))
        one_of("overlong", overlong, ("error", "drop"))
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise UsageError(f"max_length must be a number of tokens, at least 1, or None; got {max_length!r}.")
        _check_processor(processor)
        self.processor = processor if size is None else _with_size(processor, size, self.family)
        self.max_length = max_length
        self.responses_only = responses_only
        self.padding_side = padding_side
        self.overlong = overlong
        self.template_options = dict(template_options or {})
        self.ends = tuple(processor.tokenizer.get_added_vocab())
        self.media = torch.tensor(sorted(self.family.media_tokens(processor)))

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """
        Args:
            examples: Samples (see `read_conversation`), or packs: lists of samples.

        Returns:
            The processor's batch, and `labels`, int64 (batch, sequence), -100 for ignored tokens.

        Raises:
            BatchError: A sample is malformed, has no response, more or fewer images than placeholders, or is overlong.
        """
        flat = [sample for example in examples for sample in (example if isinstance(example, list) else [example])]
        samples = self._samples(flat)
        batch = self._process(samples)
        kept = self._fitting(samples, batch)
        if len(kept) < len(samples):
            samples = [samples[number] for number in kept]
            batch = self._process(samples)
        return self._trimmed(batch)

    def measure(self, example: Any) -> Measure:
        """Return the cost of a sample from the sizes of its images: files are opened, but no pixel is decoded.

        Raises:
            BatchError: The sample is malformed.
        """
        sample = self._samples([example])[0]
        sizes = [image_size(image, sample.conversation.where) for image in sample.conversation.images]
        images = (sample.ids == self.processor.image_token_id).nonzero().squeeze(1)
        lengths = torch.ones_like(sample.ids)
        lengths[images] = torch.tensor(
            [self.family.image_tokens(self.processor, *size) for size in sizes], dtype=torch.int64
        )
        ends = lengths.cumsum(0).tolist()
        tokens, needed = ends[-1], max(ends[int(index)] for index in (sample.learned.int().argmax(), *images))
        limit = tokens if self.max_length is None else self.max_length
        return Measure(min(tokens, limit), len(sizes), needed <= limit)

    # Text -----------------------------------------------------------------------------------------------------------

    def _samples(self, examples: Sequence[Any]) -> list[_Sample]:
        if not examples:
            raise BatchError("The batch has no samples.")
        conversations = [read_conversation(example, number) for number, example in enumerate(examples)]
        rendered = [render(talk, self.processor, self.template_options, self.ends) for talk in conversations]
        encoded = self.processor.tokenizer(
            [one.text for one in rendered], add_special_tokens=False, return_offsets_mapping=True
        )
        samples = []
        for number, (talk, one) in enumerate(zip(conversations, rendered, strict=True)):
            self._check_placeholders(talk, one.text)
            ids = torch.tensor(encoded["input_ids"][number])
            spans = one.spans if self.responses_only else ((0, len(one.text)),)
            learned = _within(encoded["offset_mapping"][number], spans) & ~torch.isin(ids, self.media)
            if not learned.any():
                raise BatchError(
                    f"{talk.where} has no response to learn: it needs an assistant message (in the completion, if there is "
                    "one) that is not empty."
                )
            samples.append(_Sample(talk, one.text, ids, learned))
        return samples

    def _check_placeholders(self, talk: Conversation, text: str) -> None:
        written = text.count(self.processor.image_token)
        if written != len(talk.images):
            raise BatchError(
                f"{talk.where} has {len(talk.images)} images, but its text has {written} image tokens "
                f"({self.processor.image_token}) after the chat template. Use a template that writes one for each "
                "image part, and texts without any."
            )

    # Images ---------------------------------------------------------------------------------------------------------

    def _process(self, samples: Sequence[_Sample]) -> dict[str, Tensor]:
        """Return the processor's batch, padded on the right, and its labels."""
        images = [[open_image(image, one.conversation.where) for image in one.conversation.images] for one in samples]
        batch = self.processor(
            text=[one.text for one in samples],
            **({"images": images} if any(images) else {}),
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
        )
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        return {**tensors, "labels": self._labels(samples, tensors)}

    def _labels(self, samples: Sequence[_Sample], batch: Mapping[str, Tensor]) -> Tensor:
        """Place labels: each placeholder has become a run of image tokens; other tokens are the same, in the same order."""
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (sample, ids) in enumerate(zip(samples, batch["input_ids"], strict=True)):
            positions = (batch["attention_mask"][row].bool() & ~torch.isin(ids, self.media)).nonzero().squeeze(1)
            text = ~torch.isin(sample.ids, self.media)
            if not torch.equal(ids[positions], sample.ids[text]):
                raise BatchError(
                    f"{sample.conversation.where}: the processor has changed the text besides its images, so that labels "
                    "cannot be placed. Use a chat template that writes all special tokens, the first one (bos) too."
                )
            learned = positions[sample.learned[text]]
            labels[row, learned] = ids[learned]
        return labels

    # Length ---------------------------------------------------------------------------------------------------------

    def _fitting(self, samples: Sequence[_Sample], batch: Mapping[str, Tensor]) -> list[int]:
        """Return numbers of the samples that keep their images and a label within `max_length`."""
        if self.max_length is None:
            return list(range(len(samples)))
        lengths = batch["attention_mask"].sum(1).tolist()
        needed = torch.maximum(_last(torch.isin(batch["input_ids"], self.media)), _first(batch["labels"] != IGNORED))
        kept = [number for number, need in enumerate(needed.tolist()) if need <= self.max_length]
        left_out = [number for number in range(len(samples)) if number not in kept]
        if not left_out:
            return kept
        first = left_out[0]
        reason = (
            f"{samples[first].conversation.where} has {lengths[first]} tokens, and needs {int(needed[first])} for its images "
            f"and the beginning of a response, but max_length is {self.max_length}."
        )
        remedy = "Raise max_length" + (
            f' or make images smaller (size={{"{self.family.resizable_keys[-1]}": ...}}).'
            if self.family.resizable_keys
            else "."
        )
        if self.overlong == "error":
            raise BatchError(f'{reason} {remedy} Or leave such samples out: overlong="drop".')
        if not kept:
            raise BatchError(
                f"Nothing is left of the batch. {reason} {remedy} Or keep only samples with "
                "collator.measure(sample).fits in the data set."
            )
        warnings.warn(f"{len(left_out)} of {len(samples)} samples left out. {reason}", stacklevel=3)
        return kept

    def _trimmed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cut a batch to `max_length` at the end, and pad it on the chosen side."""
        rows = self.family.input_layout
        lengths = batch["attention_mask"][:, : self.max_length].sum(1)
        for key in ("input_ids", "attention_mask", "labels", *(key for key in rows if rows[key] == "token")):
            if key in batch:
                values = batch[key][:, : int(lengths.max())]
                batch[key] = values if self.padding_side == "right" else _padded_on_the_left(values, lengths.tolist())
        return batch


def _check_processor(processor: Any) -> None:
    if not getattr(processor, "chat_template", None):
        raise UsageError(
            "The processor has no chat template to write conversations in the model's format. Use the "
            "processor that vlmbuild.load returns, or set processor.chat_template to the model's published one."
        )
    if processor.tokenizer.pad_token_id is None:
        raise UsageError(
            "The processor's tokenizer has no padding token. Set one that no text has, for example "
            "processor.tokenizer.pad_token = processor.tokenizer.eos_token; padding is never a label."
        )


def _with_size(processor: Any, size: Mapping[str, int], family: Any) -> Any:
    """Copy the processor with lower limits for images."""
    own = dict(processor.image_processor.size)
    for key, value in size.items():
        if key not in family.resizable_keys:
            known = ", ".join(family.resizable_keys) or f"none: {family.title} has images of one size"
            raise UsageError(f"size: {key!r} cannot be set. Pass one of these limits: {known}.")
        if not isinstance(value, int) or not 1 <= value <= own[key]:
            raise UsageError(f"size: {key} must be from 1 to {own[key]}, the limit of the processor; got {value!r}.")
    chosen = {**own, **size}
    if chosen.get("shortest_edge", 0) > chosen.get("longest_edge", 0) > 0:
        raise UsageError(
            f"size: shortest_edge {chosen['shortest_edge']} is above longest_edge {chosen['longest_edge']}."
        )
    limited = copy.copy(processor)
    limited.image_processor = copy.copy(processor.image_processor)
    limited.image_processor.size = SizeDict(**chosen)
    return limited


def _within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return bool (tokens,): which tokens lie in one of the spans, whole.

    A token that begins before a response is no label: its first part belongs to the prompt, and the model cannot write the
    rest as this token.
    """
    flags = [any(start <= first < last <= end for start, end in spans) for first, last in offsets]
    return torch.tensor(flags, dtype=torch.bool)


def _first(flags: Tensor) -> Tensor:
    """Return the length of each row up to its first true value: int64 (rows,)."""
    return flags.int().argmax(1) + 1


def _last(flags: Tensor) -> Tensor:
    """Return the length of each row up to its last true value: int64 (rows,)."""
    return (flags * torch.arange(1, flags.shape[1] + 1)).amax(1)


def _padded_on_the_left(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Move the padding of rows (batch, sequence, ...) from right to left."""
    width = values.shape[1]
    moved = torch.stack([row.roll(width - length, 0) for row, length in zip(values, lengths, strict=True)])
    if values.ndim > 2:  # which images a token sees: padding before all images sees none
        for row, length in zip(moved, lengths, strict=True):
            row[: width - length] = 0
    return moved
