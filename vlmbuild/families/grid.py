"""Families whose images are grids of patches, and whose image features take the places of placeholder tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from vlmbuild.errors import BatchError
from vlmbuild.families.base import Family
from vlmbuild.families.batch import ImageCost, PackedBatch, Tokens, read_tokens, refuse_gaps, repeat_end
from vlmbuild.ir.program import Input

Ints = npt.NDArray[np.int64]
FEATURE_ORDER = "feature_order"
"""Key of `vision_tensors` for the order in which a tower reads features; no input of a program."""


@dataclass(frozen=True, slots=True)
class BatchImage:
    """An image or video of a batch.

    Attributes:
        kind: "image" or "video".
        number: Index among the images, or the videos, of the batch.
        grid: Frames, rows and columns of patches.
        offsets: int64 (features,): distance of each feature's token from the first one.
        adjoining: Whether the next image's tokens may follow directly behind this one's.
    """

    kind: str
    number: int
    grid: tuple[int, int, int]
    offsets: Ints
    adjoining: ClassVar[bool] = False

    @property
    def features(self) -> int:
        return len(self.offsets)

    def __str__(self) -> str:
        return f"{self.kind} {self.number} (grid {' x '.join(map(str, self.grid))})"


class GridFamily(Family):
    """A family with packed patches in a vision tower that rotates by row and column and attends within an image or frame.

    Attributes:
        size_example: Value of the processor's `size` with few pixels, for messages; empty where the size is the model's.
    """

    size_example: str

    def remedy(self) -> str:
        """Say what to do about texts that do not go with their images."""
        smaller = (
            f" or make images smaller, for example processor(..., size={self.size_example})"
            if self.size_example
            else ""
        )
        return (
            "Pass the images to the processor together with the text, in the order in which the texts mention them. If "
            f"truncation cut tokens off, raise max_length{smaller}."
        )

    @abstractmethod
    def patch_layout(self, config: Any) -> tuple[int, int]:
        """Name the values of a patch, and the side in patches of the squares that become one feature."""

    def batch_sizes(self, config: Any, images: Sequence[ImageCost], batch: int, text_tokens: int) -> dict[str, int]:
        sizes = super().batch_sizes(config, images, batch, text_tokens)
        return sizes | {"merged": sizes["patches"] // self.patch_layout(config)[1] ** 2}

    @abstractmethod
    def read_images(
        self, batch: Mapping[str, Tensor], config: Any, processor: Any
    ) -> tuple[list[BatchImage], Tensor | None]:
        """Read the images, then the videos, of a batch, and their packed patches (patches, values).

        Raises:
            BatchError: A tensor is missing or has a wrong shape, or an image exceeds the limits of the processor.
        """

    def placeholders(self, config: Any) -> dict[int, str]:
        """Map the token id of placeholders -> kind of image."""
        return {config.image_token_id: "image"}

    def position_ids(
        self, tokens: Tokens, images: Sequence[BatchImage], batch: Mapping[str, Tensor], config: Any
    ) -> Tensor:
        """Compute the text positions: int64 (*position_axes, 1, tokens)."""
        return tokens.positions()

    def image_inputs(self, config: Any) -> tuple[Input, ...]:
        values, merge = self.patch_layout(config)
        patches = "patches" if merge == 1 else f"{merge**2}*merged"
        return (
            Input("feature_index", torch.int64, (1, "sequence")),
            Input("pixel_values", torch.float32, (patches, values)),
            Input("vision_position_ids", torch.int64, (patches, 2)),
            Input("vision_cu_seqlens", torch.int32, ("segments",)),
        )

    def vision_tensors(self, grids: Tensor, config: Any) -> dict[str, Tensor]:
        """Compute the inputs of the vision tower besides pixels from grids (images, 3).

        A tower that reads features in another order than the images' adds `FEATURE_ORDER`, int64 (features,): the numbers of
        the features in the order in which it reads them. `prepare` sorts patches and their positions by it afterwards.
        """
        return {
            "vision_position_ids": get_vision_position_ids(grids, self.patch_layout(config)[1]),
            "vision_cu_seqlens": repeat_end(get_vision_cu_seqlens(grids)),
        }

    def prepare(self, batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
        placeholders = self.placeholders(config)
        tokens = read_tokens(batch, placeholders, self.vocabulary(config))
        refuse_gaps(tokens, config)
        # Pixels with a row for every sample are cut together with the text, so only lists of media need the remedy.
        with _naming_dispatch(batch if self.input_layout["pixel_values"] == "medium" else {}):
            images, pixels = self.read_images(batch, config, processor)
            index = feature_index(tokens, images, placeholders, self.remedy())
        text = tokens.inputs(self.position_ids(tokens, images, batch, config))
        if pixels is None:
            return PackedBatch("text", text, tokens.index)
        if len(index[index >= 0]) == 1:  # A size of one is a special case to the compiler and would cost a compilation.
            images, pixels = [*images, *images], torch.cat([pixels, torch.zeros_like(pixels)])  # no token reads it
        vision = self.vision_tensors(torch.tensor([image.grid for image in images]), config)
        tensors = {"feature_index": index, "pixel_values": pixels.float(), **vision}
        order = tensors.pop(FEATURE_ORDER, None)
        if order is not None:
            tensors |= _reordered(tensors, order, self.patch_layout(config)[1] ** 2)
        return PackedBatch("image", {**text, **tensors}, tokens.index, order)


@contextmanager
def _naming_dispatch(batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Add a remedy for batches that accelerate has cut: it keeps as many rows of every tensor as the text has."""
    try:
        yield
    except BatchError as error:
        pixels = batch.get("pixel_values")
        if isinstance(pixels, Tensor) and len(pixels) == len(batch["input_ids"]):
            raise BatchError(
                f'{error} If a trainer reads an IterableDataset, pass accelerator_config={{"dispatch_batches": False}}, or it '
                "cuts batches by their first dimension."
            ) from error
        raise


def _reordered(tensors: Mapping[str, Tensor], order: Tensor, patches: int) -> dict[str, Tensor]:
    """Put patches, `patches` to a feature, in the order in which a tower reads features, and number those by it."""
    index, pixels, positions = (tensors[name] for name in ("feature_index", "pixel_values", "vision_position_ids"))
    rows = (order.unsqueeze(1) * patches + torch.arange(patches)).flatten()
    return {
        "feature_index": torch.where(index < 0, index, order.argsort()[index.clamp(min=0)]),
        "pixel_values": pixels[rows.to(pixels.device)],
        "vision_position_ids": positions[rows],
    }


def feature_index(tokens: Tokens, images: Sequence[BatchImage], placeholders: Mapping[int, str], remedy: str) -> Tensor:
    """Number the feature of every packed token: int64 (1, tokens), -1 for text.

    Args:
        tokens: The text; it mentions the images of a kind in their order.
        images: Their features are numbered in this order.
        placeholders: Token id -> kind of image.
        remedy: End of the messages.

    Raises:
        BatchError: The tokens of an image are missing, too many, or in another layout than it needs.
    """
    ids, samples = tokens.pack(tokens.ids).cpu().numpy(), tokens.samples().numpy()
    index = np.full(len(ids), -1, np.int64)
    firsts = np.cumsum([0, *(image.features for image in images)])
    for token, kind in placeholders.items():
        pending = iter([entry for entry in zip(images, firsts[:-1], strict=True) if entry[0].kind == kind])
        marked = np.flatnonzero(ids == token)
        for own in np.split(marked, np.flatnonzero(np.diff(samples[marked])) + 1):
            _number_sample(own, pending, index, f"Sample {samples[own[0]] if len(own) else 0}", kind, remedy)
        for image, _ in pending:
            raise BatchError(f"{image} has {image.features} features but no {kind} tokens in any sample. {remedy}")
    return torch.from_numpy(index).unsqueeze(0)


def _number_sample(
    own: Ints, pending: Iterator[tuple[BatchImage, Any]], index: Ints, sample: str, kind: str, remedy: str
) -> None:
    """Number the features of the placeholder tokens `own` of one sample, in place."""
    while len(own):
        image, first = next(pending, (None, 0))
        if image is None:
            raise BatchError(f"{sample} has {len(own)} {kind} tokens for which the batch holds no {kind}. {remedy}")
        held = _held(image, own)
        if held != image.features:
            raise BatchError(
                f"{sample}: {image} has {image.features} features, but the text holds {held} {kind} tokens for it. {remedy}"
            )
        index[own[:held]] = first + np.arange(held)
        own = own[held:]


def _held(image: BatchImage, own: Ints) -> int:
    """Count the tokens that follow the layout of the image, and those directly behind it that are no other image's."""
    count = min(len(own), image.features)
    matched = _leading(own[:count] - own[0] == image.offsets[:count])
    return (
        matched if matched < image.features or image.adjoining else matched + _leading(np.diff(own[matched - 1 :]) == 1)
    )


def _leading(flags: npt.NDArray[np.bool_]) -> int:
    """Count the true values before the first false one."""
    return int(np.argmin(np.append(flags, False)))


def over_limit(image: BatchImage, size: str, limit: str) -> BatchError:
    """Describe an image that is larger than the model's processor makes them; smaller ones may be intended."""
    return BatchError(
        f"{image} has {size}, but the model's processor allows {limit}: the batch was made with other limits. Use the "
        "processor that belongs to the model, or change its image_processor.size."
    )
