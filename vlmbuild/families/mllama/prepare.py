"""Llama 3.2 Vision's host prologue: tiles, the tiles that each token sees, padding, and checks of every sample.

All follows transformers, also where that is odd: real patches see padded tiles and padding images are keys, so both are
computed; a token that sees no image sees all tiles of its sample, and only its MLP branch is zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmbuild.errors import BatchError
from vlmbuild.families.base import Family, InputLayout
from vlmbuild.families.batch import ImageCost, PackedBatch, Tokens, cut_patches, read_tokens
from vlmbuild.ir.program import Input

_SHAPES = {
    "pixel_values": "(batch, images, tiles, channels, height, width)",
    "aspect_ratio_ids": "(batch, images)",
    "aspect_ratio_mask": "(batch, images, tiles)",
    "cross_attention_mask": "(batch, sequence, images, tiles)",
}


class _Tiles(NamedTuple):
    """The images of a batch from the processor; every sample has as many images as the one with most."""

    pixels: Tensor
    ratio_ids: Tensor
    ratio_mask: Tensor
    visible: Tensor


def patches_per_tile(vision: Any) -> int:
    """Count the patches of a tile, and the class embedding."""
    return int(vision.image_size // vision.patch_size) ** 2 + 1


def padded_patches(vision: Any) -> int:
    """Count the rows of a tile in the vision tower, padded to a multiple of 8."""
    return -(-patches_per_tile(vision) // 8) * 8


class MllamaPrologue(Family):
    """The part of the family that reads batches."""

    pads_image_batch = True
    input_layout: Mapping[str, InputLayout] = {
        "pixel_values": "sample",
        "aspect_ratio_ids": "sample",
        "aspect_ratio_mask": "sample",
        "cross_attention_mask": "token",
    }

    def image_inputs(self, config: Any) -> tuple[Input, ...]:
        vision = config.vision_config
        tiles, pixels = vision.max_num_tiles, vision.num_channels * vision.patch_size**2
        rows, features = tiles * padded_patches(vision), tiles * patches_per_tile(vision)
        patches = features - tiles  # without class embeddings
        return (
            Input("pixel_values", torch.float32, (f"{patches}*images", pixels)),
            Input("tile_ids", torch.int64, (f"{tiles}*images",)),
            Input("patch_groups", torch.int32, (f"{rows}*images",)),
            Input("visible_patches", torch.bool, (f"{rows}*images", "2*images")),
            Input("feature_groups", torch.int32, (f"{features}*images",)),
            Input("visible_tiles", torch.bool, ("sequence", f"{tiles}*images")),
            Input("sees_image", torch.bool, ("sequence",)),
        )

    def prepare(self, batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
        """Run the host prologue; see `Family.prepare`. All tensors of the images are needed: without `cross_attention_mask`
        transformers' SDPA sees causally, and its eager attention sees everything."""
        vision = config.vision_config
        rows, logits = self.vocabulary(config), config.get_text_config().vocab_size
        tokens = read_tokens(batch, {config.image_token_id: "image"}, rows, logits)
        text = tokens.inputs(tokens.positions())
        tiles = _read_tiles(batch, tokens, vision)
        _check_images(tokens, tiles, config)
        if tiles is None:
            return PackedBatch("text", text, tokens.index)
        tile = torch.arange(vision.max_num_tiles)
        every_tile = torch.arange(tiles.ratio_ids.numel() * vision.max_num_tiles, dtype=torch.int32)
        groups, visible_patches = _vision_groups(tiles, vision)
        visible_tiles, sees_image = _visible_tiles(tokens, tiles)
        image = {
            "pixel_values": cut_patches(tiles.pixels, vision.patch_size),
            "tile_ids": (tiles.ratio_ids.flatten()[:, None] * vision.max_num_tiles + tile).flatten(),
            "patch_groups": groups,
            "visible_patches": visible_patches,
            "feature_groups": every_tile.repeat_interleave(patches_per_tile(vision)),
            "visible_tiles": visible_tiles,
            "sees_image": sees_image,
        }
        return PackedBatch("image", {**text, **image}, tokens.index)

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        vision = config.vision_config
        tiles = vision.max_num_tiles  # padded tiles are computed and seen like the others
        return ImageCost(tiles * padded_patches(vision), 1, tiles * patches_per_tile(vision))

    def batch_sizes(self, config: Any, images: Sequence[ImageCost], batch: int, text_tokens: int) -> dict[str, int]:
        return super().batch_sizes(config, images, batch, text_tokens) | {"images": batch * len(images)}


def _read_tiles(batch: Mapping[str, Tensor], tokens: Tokens, vision: Any) -> _Tiles | None:
    if batch.get("pixel_values") is None:
        return None
    tensors = {key: _check_rank(key, batch.get(key)) for key in _SHAPES}
    pixels = tensors["pixel_values"]
    if pixels.shape[2] > vision.max_num_tiles:
        raise BatchError(
            f"pixel_values have {pixels.shape[2]} tiles an image, but the model takes at most {vision.max_num_tiles}. "
            "Use the processor that belongs to the model."
        )
    (samples, length), images, many = tokens.ids.shape, pixels.shape[1], vision.max_num_tiles
    shapes = {
        "pixel_values": (samples, images, many, vision.num_channels, vision.image_size, vision.image_size),
        "aspect_ratio_ids": (samples, images),
        "aspect_ratio_mask": (samples, images, many),
        "cross_attention_mask": (samples, length, images, many),
    }
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[key]:
            raise BatchError(
                f"{key} has shape {tuple(tensor.shape)}, but this model and input_ids {(samples, length)} need {shapes[key]}. "
                "Use the model's own processor, and cut and pad its tensors together."
            )
    ratio_mask, visible = (tensors[key].cpu().bool() for key in ("aspect_ratio_mask", "cross_attention_mask"))
    return _Tiles(pixels, tensors["aspect_ratio_ids"].cpu().long(), ratio_mask, visible)


def _check_rank(key: str, tensor: object) -> Tensor:
    if isinstance(tensor, Tensor) and tensor.ndim == _SHAPES[key].count(",") + 1:
        return tensor
    raise BatchError(
        f"The batch has images but no {key} of shape {_SHAPES[key]}. Pass everything that the processor returned, made "
        'with return_tensors="pt".'
    )


def _check_images(tokens: Tokens, tiles: _Tiles | None, config: Any) -> None:
    """Raise BatchError unless every image has its token, and tiles that the model knows."""
    mentioned = ((tokens.ids.cpu() == config.image_token_id) & tokens.mask).sum(1)
    present = torch.zeros_like(mentioned) if tiles is None else (tiles.ratio_ids > 0).sum(1)
    for sample, (marked, images) in enumerate(zip(mentioned.tolist(), present.tolist(), strict=True)):
        if marked != images:
            raise BatchError(
                f"Sample {sample} has {marked} image tokens and {images} images. Pass the images to the processor together "
                "with the text, sample by sample; raise max_length if truncation cut an image token off."
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
    """Compute the tiles that each token sees, bool (tokens, all tiles), and whether it sees any, bool (tokens,)."""
    samples, images, many = tiles.ratio_mask.shape
    rows = tokens.samples()
    own = tokens.pack(tiles.visible.flatten(2))
    sees_image = own.any(1)
    own = own | ~sees_image[:, None]  # transformers takes the mask away from a row that would see nothing
    visible = torch.zeros(len(rows), samples, images * many, dtype=torch.bool)
    visible[torch.arange(len(rows)), rows] = own
    return visible.flatten(1), sees_image


def _vision_groups(tiles: _Tiles, vision: Any) -> tuple[Tensor, Tensor]:
    """Group the vision tower's rows, int32 (rows,), and compute the groups that each row sees, bool (rows, groups).

    An image has two groups: 2 i are its patches, 2 i + 1 its padding (whole tiles, and the end of each tile). Padding sees
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
