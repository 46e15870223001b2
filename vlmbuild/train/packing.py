"""Packs of samples with a steady number of tokens, which a step's cost follows: the model computes no padding.

The model puts the tokens of all samples of a batch in one row, each sample an attention segment with its own positions. A
padded batch thus costs as much as its samples, and batches of equal numbers of samples cost unequal amounts. A pack holds as
many samples as fit a budget.
"""

from __future__ import annotations

import bisect
import random
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch.utils.data import Dataset, IterableDataset

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.train.collator import Measure, VisionDataCollator
from vlmbuild.util.validation import one_of

WINDOW = 1024
"""Samples that are packed among each other: more fill packs better and mix samples less."""

Overlong = Literal["error", "alone"]


def pack(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    groups: Sequence[Hashable] | None = None,
    window: int = WINDOW,
    seed: int = 0,
    overlong: Overlong = "error",
) -> list[list[int]]:
    """Pack samples into at most `max_tokens` tokens each: best-fit decreasing within windows of the shuffled samples.

    Args:
        lengths: Tokens of every sample.
        max_tokens: Budget of a pack.
        groups: Group of every sample; only equal groups share a pack. None allows all.
        window: Number of samples of a window.
        seed: Seed of the shuffling; the same arguments give the same packs.
        overlong: Treatment of a sample longer than the budget: "error", or its own pack ("alone").

    Returns:
        Indices into `lengths`, each exactly once.

    Raises:
        UsageError: An option is not valid.
        BatchError: A sample is longer than the budget.
    """
    one_of("overlong", overlong, ("error", "alone"))
    for name, value in (("max_tokens", max_tokens), ("window", window)):
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} must be a whole number, at least 1; got {value!r}.")
    if groups is not None and len(groups) != len(lengths):
        raise UsageError(f"groups has {len(groups)} entries, lengths {len(lengths)}; they must be equal.")
    for index, length in enumerate(lengths):
        if length > max_tokens and overlong == "error":
            raise BatchError(
                f"Sample {index} of the data set has {length} tokens, more than the {max_tokens} of a pack. Raise max_tokens, "
                'keep fewer pixels per image, set the collator\'s max_length, or pass overlong="alone" for its own pack.'
            )
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, no secret
    packs: list[list[int]] = []
    for start in range(0, len(order), window):
        by_group: dict[Hashable, list[int]] = {}
        for index in order[start : start + window]:
            by_group.setdefault(None if groups is None else groups[index], []).append(index)
        for members in by_group.values():
            packs += _best_fit(members, lengths, max_tokens)
    return packs


def _best_fit(members: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put each, longest first, into the fullest pack with room (Johnson et al., 1974: at most 11/9 of the fewest packs)."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, number of the pack), ascending
    for index in sorted(members, key=lambda index: -lengths[index]):
        slot = bisect.bisect_left(room, (lengths[index], -1))
        free, number = room.pop(slot) if slot < len(room) else (max_tokens, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(index)
        bisect.insort(room, (free - lengths[index], number))
    return packs


class PackedDataset(Dataset[list[Any]]):
    """A data set whose items are packs: lists of samples, which `VisionDataCollator` accepts.

    Use it with a batch size of 1 in a DataLoader or transformers' Trainer; TRL's SFTTrainer only accepts data sets of
    `datasets`. If the model computes the images that pad a batch (Llama 3.2 Vision), only samples with equally many images
    share a pack, so that a sample has the same results in a pack and alone.

    Args:
        dataset: Samples by index. The collator measures each once, when the packs are made.
        collator: Collator of these samples.
        max_tokens: Most tokens of a pack.
        seed: Seed of the shuffling.
        overlong: Treatment of a sample longer than that: "error", or its own pack ("alone").

    Attributes:
        indices: Indices of the packed samples: all but samples that the collator drops as overlong.
        lengths: Tokens of each packed sample.
        packs: Positions in `indices`.

    Raises:
        UsageError: The data set has no length, or no samples by index.
        BatchError: A sample is malformed, or too long.
    """

    def __init__(
        self,
        dataset: Any,
        collator: VisionDataCollator,
        max_tokens: int,
        *,
        seed: int = 0,
        overlong: Overlong = "error",
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise UsageError(
                f"PackedDataset needs len(dataset) and dataset[index], and {type(dataset).__name__} is read in order. Pass "
                "list(dataset) if it fits into memory, or give the stream to the trainer without packs."
            )
        self.dataset = dataset
        measured = [(index, collator.measure(dataset[index], index)) for index in range(len(dataset))]
        self.indices = _fitting(measured, collator)
        measures = [measured[index][1] for index in self.indices]
        self.lengths = [measure.tokens for measure in measures]
        groups = [measure.images for measure in measures] if collator.family.pads_image_batch else None
        self.packs = pack(self.lengths, max_tokens, groups=groups, seed=seed, overlong=overlong)
        self.max_tokens = max_tokens

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> list[Any]:
        return [self.dataset[self.indices[position]] for position in self.packs[number]]


def _fitting(measured: Sequence[tuple[int, Measure]], collator: VisionDataCollator) -> list[int]:
    """Return indices of the samples that the collator can cut to `max_length`, to fail now and not during training."""
    left_out = [(index, measure) for index, measure in measured if not measure.fits]
    if left_out:
        unusable = sum(not measure.tokens for _, measure in left_out)
        overlong = len(left_out) - unusable
        faults = []
        if overlong:
            faults.append(f"{overlong} have an image or their first response beyond max_length={collator.max_length}")
        if unusable:
            faults.append(f"{unusable} have an image that cannot be processed")
        shown = " and ".join(faults)
        what = f"of {len(measured)} samples, {shown}; the first is sample {left_out[0][0]} of the data set"
        refused = collator.overlong == "error" and overlong > 0
        if refused or len(left_out) == len(measured):
            remedy = "Raise max_length or keep fewer pixels per image" if overlong else "Replace these images"
            also = ', or pass overlong="drop" to the collator' if refused else ""
            raise BatchError(f"{what.capitalize()}. {remedy}{also}.")
        warnings.warn(f"Left out {what}.", stacklevel=3)
    return [index for index, measure in measured if measure.fits]


class Steps(NamedTuple):
    """Steps of an epoch.

    Attributes:
        sizes: Tokens that each step computes, padding included.
        padding: Share of padding.
    """

    sizes: tuple[int, ...]
    padding: float


@dataclass(frozen=True, slots=True)
class PaddingReport:
    """Padding and steadiness before and after packing; `str` of it is a table.

    Attributes:
        padded: Padded batches, in the order of the data set.
        packed: Packs.
        fill: Share of the packs' budget that is used.
    """

    padded: Steps
    packed: Steps
    fill: float

    def __str__(self) -> str:
        lines = [f"{'':16}{'steps':>8}{'tokens computed':>18}{'padding':>10}{'tokens of a step':>20}"]
        for name, (sizes, padding) in (("padded batches", self.padded), ("packs", self.packed)):
            of_step = f"{min(sizes):,} to {max(sizes):,}"
            lines.append(f"{name:16}{len(sizes):>8,}{sum(sizes):>18,}{padding:>10.1%}{of_step:>20}")
        return "\n".join([*lines, f"The packs are {self.fill:.1%} full."])


def padding_report(
    lengths: Sequence[int], packs: Sequence[Sequence[int]], batch_size: int, max_tokens: int | None = None
) -> PaddingReport:
    """Compare padded batches of `batch_size` samples with packs.

    Args:
        lengths: Tokens of every sample.
        packs: From `pack`, or the attribute of a `PackedDataset`.
        batch_size: Samples of a padded batch.
        max_tokens: Budget of a pack; None is the tokens of the fullest.

    Raises:
        UsageError: There are no samples, the packs belong to other samples, or the batch size is not positive.
    """
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1; got {value}.")
    if not lengths or sorted(index for one in packs for index in one) != list(range(len(lengths))):
        raise UsageError(f"The packs must hold each of the {len(lengths)} samples once, and there must be some.")
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    padded = tuple(len(batch) * max(batch) for batch in batches)
    packed = tuple(sum(lengths[index] for index in one) for one in packs)
    tokens, budget = sum(lengths), len(packs) * (max(packed) if max_tokens is None else max_tokens)
    return PaddingReport(
        Steps(padded, 1 - tokens / sum(padded)), Steps(packed, 1 - tokens / sum(packed)), tokens / budget
    )
