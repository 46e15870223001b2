"""Families whose images are cut into square tiles of one size; the vision tower sees a tile by itself, and all of it.

Tiles lie along the batch dimension of the tower, so that its attention needs no mask. A processor lists the tiles of all
samples (`input_layout` says "medium"), or pads those of a sample to the one with most of them ("sample"); padding is left
out here, on the host. transformers leaves out tiles whose
values are all zero; here `pixel_attention_mask` decides, and the values where it is missing. The two differ for a tile that is
all zero and no padding, which transformers drops, and then refuses the text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmbuild.errors import BatchError
from vlmbuild.families.base import InputLayout
from vlmbuild.families.batch import ImageCost
from vlmbuild.families.grid import BatchImage, GridFamily
from vlmbuild.families.js import ClientVision
from vlmbuild.families.traced import TextCore, place_features
from vlmbuild.ir.program import Input


@dataclass(frozen=True, slots=True)
class TileLayout:
    """Sizes of a tile, which is square, of its patches and of its features.

    Attributes:
        channels: Values of a pixel.
        side: Side of a tile in pixels; those at the end that fill no patch are left out.
        patch: Side of a patch in pixels.
        merge: Side in patches of the square that becomes one feature.
    """

    channels: int
    side: int
    patch: int
    merge: int

    @property
    def rows(self) -> int:
        """Rows, and columns, of patches."""
        return self.side // self.patch

    @property
    def patches(self) -> int:
        return self.rows**2

    @property
    def features(self) -> int:
        return self.patches // self.merge**2

    @property
    def values(self) -> int:
        """Values of a patch."""
        return self.channels * self.patch**2

    def in_blocks(self, patches: Tensor) -> Tensor:
        """Order patches (rows * columns, ...) by the squares that become one feature."""
        blocks = self.rows // self.merge
        shape = (blocks, self.merge, blocks, self.merge, *patches.shape[1:])
        return patches.view(shape).transpose(1, 2).reshape(patches.shape)

    def cut(self, tiles: Tensor) -> Tensor:
        """Cut tiles (n, channels, side, side) into patches: (n * patches, values), in the order of `in_blocks`."""
        blocks, covered = self.rows // self.merge, self.rows * self.patch
        if covered < self.side:
            tiles = tiles[..., :covered, :covered]
        squares = tiles.float().reshape(
            -1, self.channels, blocks, self.merge, self.patch, blocks, self.merge, self.patch
        )
        return squares.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, self.values)


class Tile(BatchImage):
    """A tile of a batch; `number` counts those of its sample, or of a batch that lists them."""

    adjoining = True

    def __str__(self) -> str:
        return f"tile {self.number}"


class TileCore(TextCore):
    """The traced module of a batch with images that are tiles."""

    def forward(  # type: ignore[override]  # a variant's inputs are passed by name
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        text_cu_seqlens: Tensor,
        feature_index: Tensor,
        pixel_values: Tensor,
    ) -> Tensor:
        embeddings = place_features(self.embed(input_ids), self.features(pixel_values), feature_index)
        return self.logits(embeddings, position_ids, text_cu_seqlens)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Run the vision tower and the projector: patches of tiles (tiles * patches, values) -> (features, hidden)."""
        raise NotImplementedError


class TileFamily(GridFamily):
    """A family whose processor returns tiles: `pixel_values` (samples, tiles, channels, side, side), padded, or (tiles,
    channels, side, side) where `input_layout` calls them "medium"."""

    input_layout: Mapping[str, InputLayout] = {"pixel_values": "sample", "pixel_attention_mask": "sample"}

    @abstractmethod
    def tile(self, config: Any) -> TileLayout:
        """Describe a tile."""

    def patch_layout(self, config: Any) -> tuple[int, int]:
        tile = self.tile(config)
        return tile.values, tile.merge

    def image_inputs(self, config: Any) -> tuple[Input, ...]:
        tile = self.tile(config)
        return (
            Input("feature_index", torch.int64, (1, "sequence")),
            Input("pixel_values", torch.float32, (f"{tile.patches}*tiles", tile.values)),
        )

    def vision_tensors(self, grids: Tensor, config: Any) -> dict[str, Tensor]:
        return {}  # all tiles are alike

    def read_images(
        self, batch: Mapping[str, Tensor], config: Any, processor: Any
    ) -> tuple[list[BatchImage], Tensor | None]:
        """Read `pixel_values` and, where samples have rows of them, `pixel_attention_mask` (samples, tiles, side, side)."""
        pixels = batch.get("pixel_values")
        if pixels is None:
            return [], None
        tile = self.tile(config)
        if self.input_layout["pixel_values"] == "medium":
            numbers = list(range(len(check_pixels(pixels, ("tiles",), tile))))
        else:
            real = _real_tiles(pixels, batch.get("pixel_attention_mask"), tile)
            numbers, pixels = real.nonzero()[:, 1].tolist(), pixels[real.to(pixels.device)]
            if numbers:
                self._check_samples(batch, real, tile, config)
        if not numbers:
            return [], None
        grid, offsets = (1, tile.rows, tile.rows), np.arange(tile.features)
        return [Tile("image", number, grid, offsets) for number in numbers], tile.cut(pixels)

    def _check_samples(self, batch: Mapping[str, Tensor], real: Tensor, tile: TileLayout, config: Any) -> None:
        """Raise BatchError for a sample whose text has another number of image tokens than its tiles have features.

        transformers compares the whole batch, and would shift features from one sample to another.
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if len(ids) != len(real):  # videos, of which a sample may have several
            return
        marked = ids == config.image_token_id
        counts = (marked if mask is None else marked & mask.bool()).sum(1).tolist()
        for sample, (count, tiles) in enumerate(zip(counts, real.sum(1).tolist(), strict=True)):
            if count and count != tiles * tile.features:
                raise BatchError(
                    f"Sample {sample} has {count} image tokens, but its {tiles} tiles have {tiles * tile.features} features. "
                    "Pass the images to the processor together with the text. If truncation cut tokens off, raise max_length "
                    f"or make images smaller, for example processor(..., size={self.size_example})."
                )

    def batch_sizes(self, config: Any, images: Sequence[ImageCost], batch: int, text_tokens: int) -> dict[str, int]:
        sizes = super().batch_sizes(config, images, batch, text_tokens)
        return sizes | {"tiles": sizes["patches"] // self.tile(config).patches}

    def client_vision(self, config: Any) -> ClientVision | None:
        if "pixel_attention_mask" not in self.input_layout:  # what follows is for tiles padded to the sample with most
            return None
        tile = self.tile(config)
        batch = ("batch", "tiles")
        return ClientVision(
            (
                Input("pixel_values", torch.float32, (*batch, tile.channels, tile.side, tile.side)),
                Input("pixel_attention_mask", torch.bool, (*batch, tile.side, tile.side)),
            ),
            TilePrologue(tile),
            ("pixel_values",),
        )

    def client_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        if "pixel_attention_mask" not in self.input_layout:  # what follows is for tiles padded to the sample with most
            return None
        pixels, mask = batch["pixel_values"].float(), batch.get("pixel_attention_mask")
        shown = (pixels != 0).any(2) if mask is None else mask.bool()
        return {"pixel_values": pixels, "pixel_attention_mask": shown}


def check_pixels(pixels: object, axes: tuple[str, ...], tile: TileLayout) -> Tensor:
    """Raise BatchError unless `pixel_values` are tiles in an array with these axes."""
    shape = (tile.channels, tile.side, tile.side)
    if not isinstance(pixels, Tensor) or pixels.ndim != len(axes) + 3 or tuple(pixels.shape[-3:]) != shape:
        found = f"shape {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else f"type {type(pixels).__name__}"
        raise BatchError(
            f"pixel_values must be a tensor of shape ({', '.join(map(str, (*axes, *shape)))}), but has {found}. Use the "
            'processor that belongs to the model, with return_tensors="pt".'
        )
    return pixels


def _real_tiles(pixels: object, mask: object, tile: TileLayout) -> Tensor:
    """Tell which tiles are no padding: bool (samples, tiles), on the CPU."""
    pixels = check_pixels(pixels, ("samples", "tiles"), tile)
    shown = (pixels != 0).flatten(2).any(2).cpu()
    if mask is None:
        return shown
    masked = (*pixels.shape[:2], tile.side, tile.side)
    if not isinstance(mask, Tensor) or mask.shape != masked:
        raise BatchError(
            f"pixel_attention_mask must be a tensor of shape {masked}, like pixel_values. Pass the two as one call of the "
            "processor returned them."
        )
    flat = mask.bool().flatten(2)
    real, whole = flat.any(2).cpu(), flat.all(2).cpu()
    for wrong, fault in ((real & ~whole, "is masked in part"), (shown & ~real, "is masked, but holds an image")):
        if wrong.any():
            sample, number = wrong.nonzero()[0].tolist()
            raise BatchError(
                f"Sample {sample}: tile {number} {fault} (pixel_attention_mask). Use the processor that belongs to the model: "
                "it makes whole tiles."
            )
    return real


class TilePrologue(nn.Module):
    """Patches of all tiles that are no padding, equal to `TileFamily.prepare`."""

    def __init__(self, tile: TileLayout) -> None:
        super().__init__()
        self.tile = tile

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> tuple[Tensor]:
        """Cut tiles into patches."""
        shown = pixel_attention_mask.long().flatten(0, 1).flatten(1).sum(1)
        return (self.tile.cut(pixel_values.flatten(0, 1)[shown.nonzero().squeeze(1)]),)
