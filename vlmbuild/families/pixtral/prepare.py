"""Pixtral's host prologue: patches of padded images, feature places and attention bounds; checks that name a bad sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlmbuild.errors import BatchError
from vlmbuild.families.base import PackedBatch
from vlmbuild.families.batch import Tokens, cumulative_bounds, cut_patches, read_tokens, with_spare_feature

Ints = npt.NDArray[np.int64]

_SHRINK = (
    'make images smaller, for example processor(..., size={"longest_edge": 512}), or raise max_length: truncation must not '
    "cut an image's tokens"
)


@dataclass(frozen=True, slots=True)
class _Image:
    """One image: its size in patches, the index of its first feature, and how to speak of it."""

    number: int
    rows: int
    columns: int
    first: int

    @property
    def features(self) -> int:
        return self.rows * self.columns

    def __str__(self) -> str:
        return f"image {self.number} ({self.rows} x {self.columns} patches)"


def prepare(batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
    """Everything about a batch that depends on its data.

    Args:
        batch: The processor's output: `input_ids` (b, s), optionally `attention_mask` (b, s), and `pixel_values`
            (images, channels, height, width), padded to the largest image, with `image_sizes` (images, 2) in pixels.
        config: `LlavaConfig` with a Pixtral vision tower.
        processor: Its longest edge must be the one that the batch was made with.

    Returns:
        Variant "image" or "text" and its inputs, packed.

    Raises:
        BatchError: Tokens and features differ, a tensor is missing or of the wrong shape, or a label is an image token.
    """
    tokens = read_tokens(batch, {config.image_token_id: "image"}, config.text_config.vocab_size)
    pixels, sizes = _pixels(batch, config)
    text = tokens.inputs(tokens.positions())
    patch = config.vision_config.patch_size
    images = list(_images(sizes, patch))
    _check_edges(sizes, processor)
    index = _place(tokens, images, config.image_token_id)
    if pixels is None:
        return PackedBatch("text", text, tokens.index)
    image = {
        "feature_index": tokens.pack(torch.from_numpy(index)).unsqueeze(0),
        "pixel_values": torch.cat([cut_patches(p[:, :h, :w], patch) for p, (h, w) in zip(pixels, sizes, strict=True)]),
        "vision_position_ids": torch.cat([_positions(image) for image in images]),
        "vision_cu_seqlens": cumulative_bounds(torch.tensor([image.features for image in images])),
    }
    return PackedBatch("image", {**text, **with_spare_feature(image, 1)}, tokens.index)


def _pixels(batch: Mapping[str, Tensor], config: Any) -> tuple[Tensor | None, list[tuple[int, int]]]:
    """Padded images and the size of each, in pixels."""
    pixels, sizes = batch.get("pixel_values"), batch.get("image_sizes")
    vision = config.vision_config
    if pixels is None:
        return None, []
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != vision.num_channels:
        raise BatchError(
            f"pixel_values must be a tensor of shape (images, {vision.num_channels}, height, width); use the processor "
            'with return_tensors="pt".'
        )
    if not len(pixels):
        return None, []
    if sizes is None:  # transformers takes the padded size then, too
        sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
    sizes = torch.as_tensor(sizes)
    if sizes.shape != (len(pixels), 2):
        raise BatchError(
            f"image_sizes has shape {tuple(sizes.shape)}, but there are {len(pixels)} images: ({len(pixels)}, 2)."
        )
    found = [(int(height), int(width)) for height, width in sizes.tolist()]
    for number, (height, width) in enumerate(found):
        fits = 0 < height <= pixels.shape[2] and 0 < width <= pixels.shape[3]
        if not fits or height % vision.patch_size or width % vision.patch_size:
            raise BatchError(
                f"image {number}: {height} x {width} pixels are not made of {vision.patch_size} x {vision.patch_size} "
                f"patches within pixel_values of {pixels.shape[2]} x {pixels.shape[3]}; the two do not belong together."
            )
    return pixels, found


def _check_edges(sizes: Iterable[tuple[int, int]], processor: Any) -> None:
    """Images larger than the artifact's processor makes them were made by another one. (Smaller ones may be wanted.)"""
    image_processor = getattr(processor, "image_processor", None)
    limit = getattr(image_processor, "size", {}).get("longest_edge")
    for number, size in enumerate(sizes):
        if limit and max(size) > -(-limit // processor.patch_size) * processor.patch_size:
            raise BatchError(
                f"image {number} has {size[0]} x {size[1]} pixels, but the model's processor allows no edge over {limit}: "
                "the batch was made with other limits. Use the processor that belongs to the model, or change its "
                "image_processor.size."
            )


def _images(sizes: Iterable[tuple[int, int]], patch: int) -> Iterator[_Image]:
    first = 0
    for number, (height, width) in enumerate(sizes):
        image = _Image(number, height // patch, width // patch, first)
        first += image.features
        yield image


def _positions(image: _Image) -> Tensor:
    """Row and column of every patch: int64 (features, 2)."""
    rows, columns = torch.arange(image.rows), torch.arange(image.columns)
    return torch.cartesian_prod(rows, columns).reshape(-1, 2)


def _place(tokens: Tokens, images: list[_Image], image_token: int) -> Ints:
    """Feature index (b, s) of every token, -1 for text. A row of patches is a run of image tokens, and a break follows."""
    ids, mask = tokens.ids.cpu().numpy(), tokens.mask.numpy()
    index = np.full(ids.shape, -1, np.int64)
    left = iter(images)
    for sample, (row, attended) in enumerate(zip(ids, mask, strict=True)):
        places = np.flatnonzero((row == image_token) & attended)
        while len(places):
            image = _next(left, sample, places)
            index[sample, places[: image.features]] = image.first + np.arange(image.features)
            places = places[image.features :]
    for image in left:
        raise BatchError(
            f"{image} has {image.features} features but no image tokens in any sample. The texts hold fewer images than "
            f"the batch, or truncation cut them off: {_SHRINK}."
        )
    return index


def _next(left: Iterator[_Image], sample: int, places: Ints) -> _Image:
    """The image that the tokens at these places begin with."""
    image = next(left, None)
    if image is None:
        raise BatchError(
            f"Sample {sample} has {len(places)} image tokens for which the batch holds no image: 0 features. Pass the images "
            "to the processor together with the text, in the order in which the texts mention them."
        )
    if image.features > len(places):
        raise BatchError(
            f"Sample {sample}: {image} has {image.features} features, but the text holds {len(places)} image tokens for it. "
            f"If the batch was cut by truncation, {_SHRINK}."
        )
    expected = np.arange(image.rows)[:, None] * (image.columns + 1) + np.arange(image.columns)
    if not np.array_equal(places[: image.features] - places[0], expected.ravel()):
        raise BatchError(
            f"Sample {sample}: its image tokens do not stand in {image.rows} rows of {image.columns}, as {image} needs. The "
            "images are in another order than the texts mention them, or the text was made for other sizes."
        )
    return image
