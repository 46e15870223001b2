"""Collator from chat samples with images to a batch with labels, on responses only, without cutting images."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families import family_of_processor
from vlmbuild.families.images import ImageError
from vlmbuild.runtime.torch.loss import IGNORED
from vlmbuild.train.conversation import Conversation, is_pack, read_conversation
from vlmbuild.train.media import MediaReader, as_they_are, named_errors, with_size
from vlmbuild.train.render import check_processor, render
from vlmbuild.train.rows import padded_on_the_left, until_first, until_last, within
from vlmbuild.util.validation import one_of


class Measure(NamedTuple):
    """The cost of a sample.

    Attributes:
        tokens: Tokens, including its images', after truncation to `max_length`.
        images: Number of images.
        fits: True if all its images and the beginning of a response fit into `max_length`, and its images can be processed;
            where they cannot, tokens are 0.
    """

    tokens: int
    images: int
    fits: bool


@dataclass(frozen=True, slots=True)
class _Sample:
    """A rendered conversation; its tokens, with one per image or video, and which of them are labels."""

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
        unusable: Treatment of a sample with an image that cannot be read or processed: "error", or "drop" with a warning.
        ignore_columns: Columns of samples to leave out; others that are not read are errors.
        tags: Whether `<image>` and `<video>` in texts are placeholders of images and videos.
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
        unusable: Literal["error", "drop"] = "error",
        ignore_columns: Collection[str] = (),
        tags: bool = True,
        size: Mapping[str, int] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.family = family_of_processor(processor)
        one_of("padding_side", padding_side, ("right", "left"))
        one_of("overlong", overlong, ("error", "drop"))
        one_of("unusable", unusable, ("error", "drop"))
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise UsageError(f"max_length must be a number of tokens, at least 1, or None; got {max_length!r}.")
        check_processor(processor, template_options or {})
        self.processor = processor if size is None else with_size(processor, size, self.family)
        self.max_length = max_length
        self.responses_only = responses_only
        self.padding_side = padding_side
        self.overlong = overlong
        self.unusable = unusable
        self.ignore_columns = tuple(ignore_columns)
        self.tags = tags
        self.template_options = dict(template_options or {})
        self.ends = tuple(processor.tokenizer.get_added_vocab())
        self.media = torch.tensor(sorted(self.family.media_tokens(processor)))
        self.media_reader = MediaReader(self.family, self.processor)
        self._warned_of_cuts = False

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """
        Args:
            examples: Samples (see `read_conversation`), or packs: lists of samples.

        Returns:
            The processor's batch, and `labels`, int64 (batch, sequence), -100 for ignored tokens.

        Raises:
            BatchError: A sample is malformed, has no response, more or fewer images than placeholders, or is overlong.
        """
        flat = [sample for example in examples for sample in (example if is_pack(example) else [example])]
        if not flat:
            raise BatchError("The batch has no samples.")
        samples, batch = self._processed(self._samples(flat))
        kept = self._fitting(samples, batch)
        if len(kept) < len(samples):
            samples, batch = self._processed([samples[number] for number in kept])
        self._warn_of_cuts(samples, batch)
        return self._trimmed(batch)

    def measure(self, example: Any, number: int = 0) -> Measure:
        """Return the cost of a sample from the sizes of its images: files are opened, but no pixel is decoded.

        Args:
            example: A sample.
            number: Its number, for error messages.

        Raises:
            BatchError: The sample is malformed, or has an image that cannot be processed and `unusable` is "error".
        """
        sample = self._samples([example], number)[0]
        images = len(sample.conversation.values("image"))
        try:
            costs = [self.media_reader.tokens(media, sample.conversation.where) for media in sample.conversation.media]
        except ImageError:
            if self.unusable == "drop":
                return Measure(0, images, False)
            raise
        places = torch.isin(sample.ids, torch.tensor([*self.media_reader.placeholders.values()])).nonzero().squeeze(1)
        lengths = (~self.media_reader.joined(sample.ids)).long()
        lengths[places] = torch.tensor(costs, dtype=torch.int64)
        ends = lengths.cumsum(0).tolist()
        tokens, needed = ends[-1], max(ends[int(index)] for index in (sample.learned.int().argmax(), *places))
        limit = tokens if self.max_length is None else self.max_length
        return Measure(min(tokens, limit), images, needed <= limit)

    # Text -----------------------------------------------------------------------------------------------------------

    def _samples(self, examples: Sequence[Any], first: int = 0) -> list[_Sample]:
        conversations = [
            read_conversation(example, number, ignore=self.ignore_columns, tags=self.tags)
            for number, example in enumerate(examples, first)
        ]
        rendered = [
            render(talk, self.processor, self.template_options, self.ends, others=not self.responses_only)
            for talk in conversations
        ]
        encoded = self.processor.tokenizer(
            [one.text for one in rendered], add_special_tokens=False, return_offsets_mapping=True
        )
        samples = []
        for number, (talk, one) in enumerate(zip(conversations, rendered, strict=True)):
            self._check_placeholders(talk, one.text)
            ids, offsets = torch.tensor(encoded["input_ids"][number]), encoded["offset_mapping"][number]
            learned = within(offsets, one.responses if self.responses_only else ((0, len(one.text)),))
            learned &= ~within(offsets, one.others) & ~torch.isin(ids, self.media)
            if not learned.any():
                raise BatchError(
                    f"{talk.where} has no response to learn: it needs an assistant message (in the completion, if there is "
                    "one) that is not empty and has no weight of 0."
                )
            samples.append(_Sample(talk, one.text, ids, learned))
        return samples

    def _check_placeholders(self, talk: Conversation, text: str) -> None:
        for kind in ("image", "video"):
            token = getattr(self.processor, f"{kind}_token", None)
            count, written = len(talk.values(kind)), 0 if token is None else text.count(token)
            if count and token is None:
                raise BatchError(
                    f"{talk.where} has {count} {kind}s, but {self.family.title} reads none. Leave them out."
                )
            if written != count:
                raise BatchError(
                    f"{talk.where} has {count} {kind}s, but its text has {written} {kind} tokens "
                    f"({token}) after the chat template. Use a template that writes one for each "
                    f"{kind} part, and texts without any."
                )

    # Images ---------------------------------------------------------------------------------------------------------

    def _processed(self, samples: Sequence[_Sample]) -> tuple[list[_Sample], dict[str, Tensor]]:
        """Process samples, without unusable ones if that is wanted."""
        usable, faults = [], []
        try:
            return list(samples), self._process(samples)
        except ImageError as error:
            if self.unusable == "error" and len(samples) == 1:
                raise
            first = error
        for sample in samples:  # one by one, to name or drop those that fail
            try:
                self._process([sample])
                usable.append(sample)
            except ImageError as error:
                if self.unusable == "error":
                    raise
                faults.append(error)
        if not usable or not faults:
            raise (faults or [first])[0]
        warnings.warn(f"{len(faults)} of {len(samples)} samples left out. {faults[0]}", stacklevel=4)
        return usable, self._process(usable)

    def _process(self, samples: Sequence[_Sample]) -> dict[str, Tensor]:
        """Return the processor's batch, padded on the right, and its labels."""
        opened: dict[str, list[list[Any]]] = {}
        for kind in ("image", "video"):
            opened[kind] = [
                [self.media_reader.open(m, one.conversation.where) for m in one.conversation.values(kind)]
                for one in samples
            ]
        videos = [video for one in opened["video"] for video in one]
        with named_errors(samples[0].conversation.where if len(samples) == 1 else "The batch", "its images or videos"):
            batch = self.processor(
                text=[one.text for one in samples],
                **({"images": opened["image"]} if any(opened["image"]) else {}),
                **(as_they_are(videos) if videos else {}),
                padding=True,
                padding_side="right",
                add_special_tokens=False,
                return_tensors="pt",
            )
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        return {**tensors, "labels": self._labels(samples, tensors)}

    def _labels(self, samples: Sequence[_Sample], batch: Mapping[str, Tensor]) -> Tensor:
        """Place labels: each placeholder has become what the processor writes; other tokens are as they were, in order."""
        labels = torch.full_like(batch["input_ids"], IGNORED)
        media = self.family.is_media(batch["input_ids"], self.media, int(self.processor.image_token_id))
        for row, (sample, ids) in enumerate(zip(samples, batch["input_ids"], strict=True)):
            positions = (batch["attention_mask"][row].bool() & ~media[row]).nonzero().squeeze(1)
            text = ~(torch.isin(sample.ids, self.media) | self.media_reader.joined(sample.ids))
            if not torch.equal(ids[positions], sample.ids[text]):
                raise BatchError(
                    f"{sample.conversation.where}: the processor has changed the text besides its images and videos, so that "
                    "labels cannot be placed. Use a chat template that writes all special tokens, the first one (bos) too, "
                    "and texts without tokens of images and videos."
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
        needed = torch.maximum(
            until_last(torch.isin(batch["input_ids"], self.media)), until_first(batch["labels"] != IGNORED)
        )
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

    def _warn_of_cuts(self, samples: Sequence[_Sample], batch: Mapping[str, Tensor]) -> None:
        """Warn of the first response that loses its end, and with it the token that ends a turn."""
        if self.max_length is None or self._warned_of_cuts:
            return
        cut = (batch["labels"][:, self.max_length :] != IGNORED).any(1).tolist()
        if any(cut):
            self._warned_of_cuts = True
            warnings.warn(
                f"{samples[cut.index(True)].conversation.where}: the end of a response lies beyond max_length "
                f"{self.max_length} and is not learned. Raise max_length; later samples are cut without a warning.",
                stacklevel=3,
            )

    def _trimmed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cut a batch to `max_length` at the end, and pad it on the chosen side."""
        rows = self.family.input_layout
        lengths = batch["attention_mask"][:, : self.max_length].sum(1)
        for key in ("input_ids", "attention_mask", "labels", *(key for key in rows if rows[key] == "token")):
            if key in batch:
                values = batch[key][:, : int(lengths.max())]
                batch[key] = values if self.padding_side == "right" else padded_on_the_left(values, lengths.tolist())
        if self.padding_side == "left":  # nothing but padding is before the first token
            batch["labels"][:, 1:][batch["attention_mask"][:, :-1] == 0] = IGNORED
        return batch
