"""Llama 3.2 Vision's host prologue: tiles, which tiles each token sees, and what is padding; checks that name a bad sample.

Everything is as transformers treats it, also where that is odd: real patches see padded tiles and padding images are keys, so
both are computed; a token that no image is visible to sees all tiles of its sample, and only its MLP branch is zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmbuild.errors import BatchError
from vlmbuild.families.base import PackedBatch
from vlmbuild.families.batch import Tokens, cut_patches, read_tokens

_SHAPES = {
    "pixel_values": "(batch, images, tiles, channels, height, width)",
    "aspect_ratio_ids": "(batch, images)",
    "aspect_ratio_mask": "(batch, images, tiles)",
    "cross_attention_mask": "(batch, sequence, images, tiles)",
}


class _Tiles(NamedTuple):
    """The images of a batch, as the processor makes them; every sample has as many images as the one with most."""

    pixels: Tensor
    ratio_ids: Tensor
    ratio_mask: Tensor
    visible: Tensor


def patches_per_tile(vision: Any) -> int:
    """Patches of a tile, and the class embedding."""
    return int(vision.image_size // vision.patch_size) ** 2 + 1


def padded_patches(vision: Any) -> int:
    """Rows of a tile in the vision tower: padded to a multiple of 8."""
    return -(-patches_per_tile(vision) // 8) * 8


def prepare(batch: Mapping[str, Tensor], config: Any) -> PackedBatch:
    """Everything about a batch that depends on its data.

    Args:
        batch: The processor's output: `input_ids` (b, s), optionally `attention_mask` (b, s), and for images
            `pixel_values`, `aspect_ratio_ids`, `aspect_ratio_mask` and `cross_attention_mask`. All are needed: without the
            last, transformers' SDPA sees causally, and its eager attention sees everything.
        config: `MllamaConfig`.

    Returns:
        Variant "image" or "text" and its inputs, packed.

    Raises:
        BatchError: A sample's images and image tokens differ, a tensor is missing or of the wrong shape, an image has more
            tiles than the config, or a label is the image token.
    """
    tokens = read_tokens(batch, {config.image_token_id: "image"}, config.text_config.vocab_size + 8)
    text = tokens.inputs(tokens.positions())
    tiles = _tiles(batch, tokens, config.vision_config)
    _check_images(tokens, tiles, config)
    if tiles is None:
        return PackedBatch("text", text, tokens.index)
    vision = config.vision_config
    count = tiles.ratio_ids.numel()
    per_tile = torch.arange(count * vision.max_num_tiles, dtype=torch.int32)
    visible, sees_image = _visible_tiles(tokens, tiles)
    groups, visible_patches = _vision_groups(tiles, vision)
    image = {
        "pixel_values": cut_patches(tiles.pixels, vision.patch_size),
        "tile_ids": (
            tiles.ratio_ids.flatten()[:, None] * vision.max_num_tiles + torch.arange(vision.max_num_tiles)
        ).flatten(),
        "patch_groups": groups,
        "visible_patches": visible_patches,
        "feature_groups": per_tile.repeat_interleave(patches_per_tile(vision)),
        "visible_tiles": visible,
        "sees_image": sees_image,
    }
    return PackedBatch("image", {**text, **image}, tokens.index)


def _tiles(batch: Mapping[str, Tensor], tokens: Tokens, vision: Any) -> _Tiles | None:
    if batch.get("pixel_values") is None:
        return None
    found = {key: _of_rank(key, batch.get(key)) for key in _SHAPES}
    pixels = found["pixel_values"]
    if pixels.shape[2] > vision.max_num_tiles:
        raise BatchError(
            f"pixel_values have {pixels.shape[2]} tiles an image, but the model was made for at most {vision.max_num_tiles}. "
            "Use the processor that belongs to the model."
        )
    (samples, length), images, many = tokens.ids.shape, pixels.shape[1], vision.max_num_tiles
    wanted = {
        "pixel_values": (samples, images, many, vision.num_channels, vision.image_size, vision.image_size),
        "aspect_ratio_ids": (samples, images),
        "aspect_ratio_mask": (samples, images, many),
        "cross_attention_mask": (samples, length, images, many),
    }
    for key, tensor in found.items():
        if tuple(tensor.shape) != wanted[key]:
            raise BatchError(
                f"{key} has shape {tuple(tensor.shape)}, but this model and input_ids {(samples, length)} need {wanted[key]}: "
                "the batch was made by another model's processor, or its tensors were not cut and padded together."
            )
    ratio_mask, visible = (found[key].cpu().bool() for key in ("aspect_ratio_mask", "cross_attention_mask"))
    return _Tiles(pixels, found["aspect_ratio_ids"].cpu().long(), ratio_mask, visible)


def _of_rank(key: str, tensor: object) -> Tensor:
    if isinstance(tensor, Tensor) and tensor.ndim == _SHAPES[key].count(",") + 1:
        return tensor
    raise BatchError(
        f"The batch has images but no {key} of shape {_SHAPES[key]}; pass everything that the processor returned, made "
        'with return_tensors="pt".'
    )


def _check_images(tokens: Tokens, tiles: _Tiles | None, config: Any) -> None:
    """Every image has its token, and tiles that the model knows."""
    mentioned = ((tokens.ids.cpu() == config.image_token_id) & tokens.mask).sum(1)
    present = torch.zeros_like(mentioned) if tiles is None else (tiles.ratio_ids > 0).sum(1)
    for sample, (want, have) in enumerate(zip(mentioned.tolist(), present.tolist(), strict=True)):
        if want != have:
            raise BatchError(
                f"Sample {sample} has {want} image tokens and {have} images. Pass the images to the processor together with "
                "the text, sample by sample; truncation must not cut an image token off, so raise max_length if it did."
            )
    if tiles is None:
        return
    ratios = torch.tensor(
        [[1, 1], *config.vision_config.supported_aspect_ratios]
    )  # 0 is a padding image: its first tile
    for sample, ids in enumerate(tiles.ratio_ids.tolist()):
        for number, ratio in enumerate(ids):
            shown = int(tiles.ratio_mask[sample, number].sum())
            if not 0 <= ratio < len(ratios) or shown != int(ratios[ratio].prod()):
                raise BatchError(
                    f"Sample {sample}: image {number} has aspect ratio id {ratio} and {shown} tiles, but config.json has "
                    f"{len(ratios) - 1} aspect ratios of at most {config.vision_config.max_num_tiles} tiles. Use the "
                    "processor that belongs to the model."
                )


def _visible_tiles(tokens: Tokens, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """Which tiles each token sees, bool (tokens, all tiles), and whether it sees an image at all, bool (tokens,)."""
    samples, images, many = tiles.ratio_mask.shape
    rows = tokens.samples()
    own = tokens.pack(tiles.visible.flatten(2))
    sees_image = own.any(1)
    own = own | ~sees_image[:, None]  # transformers takes the mask away from a row that would see nothing
    visible = torch.zeros(len(rows), samples, images * many, dtype=torch.bool)
    visible[torch.arange(len(rows)), rows] = own
    return visible.flatten(1), sees_image


def _vision_groups(tiles: _Tiles, vision: Any) -> tuple[Tensor, Tensor]:
    """Groups of the vision tower's rows, int32 (rows,), and which groups each row sees, bool (rows, groups).

    An image has two groups: 2 i are its patches, 2 i + 1 its padding (whole tiles, and what fills a tile up). Padding sees
    patches only; patches see all of their image.
    """
    count, many, patches, rows = (
        tiles.ratio_ids.numel(),
        vision.max_num_tiles,
        patches_per_tile(vision),
        padded_patches(vision),
    )
    padding = torch.ones(count, many, rows, dtype=torch.bool)
    padding[:, :, :patches] = ~tiles.ratio_mask.view(count, many, 1)
    padding = padding.view(count, many * rows)
    groups = 2 * torch.arange(count)[:, None] + padding
    visible = torch.zeros(count, many * rows, count, 2, dtype=torch.bool)
    image = torch.arange(count)
    visible[image, :, image, 0] = True
    visible[image, :, image, 1] = ~padding
    return groups.flatten().int(), visible.view(count * many * rows, 2 * count)
