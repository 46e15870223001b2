"""Qwen2-VL's host prologue: positions, feature places and attention bounds of a batch; checks that name a bad sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

from vlmbuild.errors import BatchError
from vlmbuild.families.base import PackedBatch
from vlmbuild.families.batch import cumulative_bounds, read_tokens, with_spare_feature

Ints = npt.NDArray[np.int64]

_SHRINK = (
    'keep fewer pixels per image, for example processor(..., size={"shortest_edge": 3136, "longest_edge": 401408}), '
    "or raise max_length: truncation must not cut an image's tokens"
)


@dataclass(frozen=True, slots=True)
class _Medium:
    """One image or video: its grid, its number of merged features, the index of its first, and how to speak of it."""

    kind: str
    number: int
    grid: tuple[int, int, int]
    features: int
    first: int

    def __str__(self) -> str:
        t, h, w = self.grid
        return f"{self.kind} {self.number} (grid {t} x {h} x {w})"


def prepare(batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
    """Everything about a batch that depends on its data, computed on the CPU.

    Args:
        batch: The processor's output: `input_ids` (b, s), optionally `attention_mask` (b, s), `pixel_values`
            (patches, pixels) with `image_grid_thw` (images, 3), and the same for videos. Other keys are ignored.
        config: `Qwen2VLConfig`.
        processor: Its pixel limits must be those that the batch was made with.

    Returns:
        Variant "image" or "text" and its inputs, packed. `position_ids` (3, 1, tokens) follow
        `Qwen2VLModel.get_rope_index` of transformers 5.20 to 5.23: text after an image or video goes on at its
        start + max(h, w) / 2.

    Raises:
        BatchError: Tokens and features differ, a tensor is missing or of the wrong shape, or a label is a placeholder.
    """
    special = {config.image_token_id: "image", config.video_token_id: "video"}
    text = read_tokens(batch, special, config.text_config.vocab_size)
    vision = config.vision_config
    merge = vision.spatial_merge_size
    images, pixels, image_grids = _media(batch, "image", "pixel_values", vision, 0)
    videos, video_pixels, video_grids = _media(
        batch, "video", "pixel_values_videos", vision, sum(m.features for m in images)
    )
    _check_pixels(images, config.vision_config.patch_size, merge, processor)
    tokens = {config.image_token_id: iter(images), config.video_token_id: iter(videos)}
    positions, index = _place(text.ids.cpu().numpy(), text.mask.numpy(), tokens, config, merge)
    for leftover in (*tokens[config.image_token_id], *tokens[config.video_token_id]):
        raise BatchError(
            f"{leftover} has {leftover.features} features but no placeholder tokens in any sample. The texts hold fewer "
            f"media than the batch, or truncation cut them off: {_SHRINK}."
        )
    tensors = text.inputs(torch.from_numpy(positions).flatten(1)[:, text.index].unsqueeze(1))
    if not images and not videos:
        return PackedBatch("text", tensors, text.index)
    grids = torch.cat([image_grids, video_grids])
    image = {
        "feature_index": text.pack(torch.from_numpy(index)).unsqueeze(0),
        "pixel_values": torch.cat([p for p in (pixels, video_pixels) if p is not None]).float(),
        "vision_position_ids": get_vision_position_ids(grids, merge),
        "vision_cu_seqlens": cumulative_bounds(torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])),
    }
    return PackedBatch("image", {**tensors, **with_spare_feature(image, merge**2)}, text.index)


def _check_pixels(images: Iterable[_Medium], patch: int, merge: int, processor: Any) -> None:
    """Images larger than the artifact's processor makes them were made by another one. (Smaller ones may be wanted. A side
    of one feature may break the limit: the processor makes none shorter.)"""
    limit = getattr(getattr(processor, "image_processor", None), "size", {}).get("longest_edge")
    for image in images:
        _, h, w = image.grid
        if limit and h * w * patch**2 > limit and min(h, w) > merge:
            raise BatchError(
                f"{image} has {h * w * patch**2:,} pixels, but the model's processor allows {limit:,}: the batch was made "
                "with other pixel limits. Use the processor that belongs to the model, or change its image_processor.size."
            )


def _media(
    batch: Mapping[str, Tensor], kind: str, pixel_key: str, vision: Any, first: int
) -> tuple[list[_Medium], Tensor | None, Tensor]:
    """The images or videos of a batch, their patches, and their grids (n, 3) on the CPU."""
    pixels, grids = batch.get(pixel_key), batch.get(f"{kind}_grid_thw")
    if (pixels is None) != (grids is None):
        missing = f"{kind}_grid_thw" if grids is None else pixel_key
        raise BatchError(f"The batch has {kind}s but no {missing}; pass everything that the processor returned.")
    if pixels is None or grids is None:
        return [], None, torch.empty(0, 3, dtype=torch.int64)
    if not isinstance(grids, Tensor) or not isinstance(pixels, Tensor) or grids.ndim != 2 or grids.shape[1] != 3:
        raise BatchError(
            f'{kind}_grid_thw must be a tensor of shape ({kind}s, 3); use the processor with return_tensors="pt".'
        )
    grids = grids.cpu().long()
    merge = vision.spatial_merge_size
    media = []
    for number, (t, h, w) in enumerate(grids.tolist()):
        if h % merge or w % merge or min(t, h, w) < 1:
            raise BatchError(
                f"{kind} {number}: grid {t} x {h} x {w} is not made of {merge} x {merge} blocks of patches."
            )
        media.append(_Medium(kind, number, (t, h, w), t * h * w // merge**2, first))
        first += media[-1].features
    patches = sum(medium.features for medium in media) * merge**2
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    if tuple(pixels.shape) != (patches, width):
        raise BatchError(
            f"{pixel_key} has shape {tuple(pixels.shape)}, but the grids of the {len(media)} {kind}s in "
            f"{kind}_grid_thw need {patches} patches of {width} values; the two do not belong together."
        )
    return media, pixels, grids


def _place(
    ids: Ints, mask: npt.NDArray[np.bool_], media: Mapping[int, Iterator[_Medium]], config: Any, merge: int
) -> tuple[Ints, Ints]:
    """Position ids (3, b, s) and feature indices (b, s; -1 for text)."""
    positions = np.zeros((3, *ids.shape), np.int64)
    index = np.full(ids.shape, -1, np.int64)
    for sample, (row, attended) in enumerate(zip(ids, mask, strict=True)):
        places = np.flatnonzero(attended)
        tokens = row[places]
        done, position = 0, 0
        for start, end in _runs(tokens, tuple(media)):
            positions[:, sample, places[done:start]] = position + np.arange(start - done)
            position += start - done
            while start < end:
                medium = _next(media[int(tokens[start])], sample, end - start, tokens[start] == config.image_token_id)
                where = places[start : start + medium.features]
                positions[:, sample, where] = position + _grid_positions(medium.grid, merge)
                index[sample, where] = medium.first + np.arange(medium.features)
                position += max(medium.grid[1:]) // merge
                start += medium.features
            done = end
        positions[:, sample, places[done:]] = position + np.arange(len(places) - done)
    return positions, index


def _next(media: Iterator[_Medium], sample: int, tokens: int, image: bool) -> _Medium:
    """The medium that a run of `tokens` placeholder tokens begins with."""
    medium = next(media, None)
    kind = "image" if image else "video"
    if medium is None:
        raise BatchError(
            f"Sample {sample} has {tokens} {kind} tokens for which the batch holds no {kind}: 0 features. Pass the "
            f"{kind}s to the processor together with the text, in the order in which the texts mention them."
        )
    if medium.features > tokens:
        raise BatchError(
            f"Sample {sample}: {medium} has {medium.features} features, but the text holds {tokens} {kind} tokens for it. "
            f"If the batch was cut by truncation, {_SHRINK}."
        )
    return medium


def _runs(tokens: Ints, kinds: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, end) of every run of equal placeholder tokens."""
    placeholder = np.where(np.isin(tokens, kinds), tokens, -1)
    edges = np.flatnonzero(np.diff(placeholder)) + 1
    for start, end in zip(np.concatenate([[0], edges]), np.concatenate([edges, [len(tokens)]]), strict=True):
        if start < end and placeholder[start] >= 0:
            yield int(start), int(end)


def _grid_positions(grid: tuple[int, int, int], merge: int) -> Ints:
    """(3, features): frame, row and column of every merged feature, in raster order."""
    t, h, w = grid
    axes = np.meshgrid(np.arange(t), np.arange(h // merge), np.arange(w // merge), indexing="ij")
    return np.stack(axes).reshape(3, -1)
