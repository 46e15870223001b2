"""Families whose processors pad images to the largest one and write a token after every row of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmbuild.errors import BatchError
from vlmbuild.families.base import InputLayout
from vlmbuild.families.batch import cut_patches
from vlmbuild.families.grid import BatchImage, GridFamily, over_limit
from vlmbuild.families.js import ClientVision
from vlmbuild.ir.program import Input


class PackedPatchFamily(GridFamily):
    """A family with Pixtral's batches: `pixel_values` and `image_sizes`."""

    input_layout: Mapping[str, InputLayout] = {"pixel_values": "medium", "image_sizes": "medium"}
    resizable_keys = ("longest_edge",)
    size_example = '{"longest_edge": 512}'

    def patch_layout(self, config: Any) -> tuple[int, int]:
        values = config.vision_config.num_channels * config.vision_config.patch_size**2
        return values, getattr(config, "spatial_merge_size", 1)

    def read_images(
        self, batch: Mapping[str, Tensor], config: Any, processor: Any
    ) -> tuple[list[BatchImage], Tensor | None]:
        """Read `pixel_values` (images, channels, height, width), padded to the largest image, with `image_sizes` (images, 2)
        in pixels."""
        pixels = batch.get("pixel_values")
        if pixels is None or not len(pixels):
            return [], None
        patch, merge = config.vision_config.patch_size, self.patch_layout(config)[1]
        unit = patch * merge
        sizes = _sizes(pixels, batch.get("image_sizes"), config.vision_config.num_channels, unit)
        limit = getattr(getattr(processor, "image_processor", None), "size", {}).get("longest_edge")
        images, patches = [], []
        for number, (height, width) in enumerate(sizes):
            rows, columns = height // unit, width // unit
            # A row of features is a run of image tokens; a break or the end follows.
            offsets = (np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)).ravel()
            images.append(BatchImage("image", number, (1, rows * merge, columns * merge), offsets))
            if limit and max(height, width) > -(-limit // unit) * unit:
                raise over_limit(images[-1], f"{height} x {width} pixels", f"no edge over {limit}")
            blocks = cut_patches(pixels[number, :, :height, :width], unit)
            patches.append(cut_patches(blocks.view(-1, pixels.shape[1], unit, unit), patch))
        return images, torch.cat(patches)

    def client_vision(self, config: Any) -> ClientVision | None:
        vision, merge = config.vision_config, self.patch_layout(config)[1]
        unit = vision.patch_size * merge
        shape = ("images", vision.num_channels, f"{unit}*rows", f"{unit}*columns")
        return ClientVision(
            (Input("pixel_values", torch.float32, shape), Input("image_sizes", torch.int64, ("listed", 2))),
            PatchPrologue(vision.patch_size, merge),
            ("pixel_values", "vision_position_ids", "vision_cu_seqlens"),
            optional=("image_sizes",),
        )

    def client_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        sizes = batch.get("image_sizes")
        listed = {} if sizes is None else {"image_sizes": torch.as_tensor(sizes).long()}
        return {"pixel_values": batch["pixel_values"].float(), **listed}


def _sizes(pixels: object, sizes: object, channels: int, unit: int) -> list[tuple[int, int]]:
    """Read the size of each image, in pixels; features come from squares of `unit` pixels a side."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != channels:
        raise BatchError(
            f"pixel_values must be a tensor of shape (images, {channels}, height, width). Use the processor "
            'with return_tensors="pt".'
        )
    if sizes is None:  # transformers takes the padded size then, too
        sizes = [pixels.shape[2:]] * len(pixels)
    listed = torch.as_tensor(sizes)
    if listed.shape != (len(pixels), 2):
        raise BatchError(
            f"image_sizes has shape {tuple(listed.shape)}, but there are {len(pixels)} images, which need "
            f"({len(pixels)}, 2). Pass the two as one call of the processor returned them."
        )
    found = [(int(height), int(width)) for height, width in listed.tolist()]
    for number, (height, width) in enumerate(found):
        fits = 0 < height <= pixels.shape[2] and 0 < width <= pixels.shape[3]
        if not fits or height % unit or width % unit:
            raise BatchError(
                f"image {number}: {height} x {width} pixels are not made of {unit} x {unit} "
                f"squares within pixel_values of {pixels.shape[2]} x {pixels.shape[3]}. Pass the two as one call of the "
                "processor returned them."
            )
    return found


class PatchPrologue(nn.Module):
    """Patches of padded images, the row and column of each and the bounds of images, equal to `PackedPatchFamily.prepare`.

    Patches are in the order of blocks, `merge` x `merge` of them.
    """

    def __init__(self, patch: int, merge: int) -> None:
        super().__init__()
        self.patch = patch
        self.merge = merge

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut images into patches, with their positions and bounds; `image_sizes` (images, 2) without rows means no
        padding."""
        images, channels, height, width = pixel_values.shape
        side, device = self.patch, image_sizes.device
        number, row, column = (torch.arange(n, device=device) for n in (images, height // side, width // side))
        whole = torch.stack([row[-1:] + 1, column[-1:] + 1], dim=1) + 0 * number.unsqueeze(1)
        listed = torch.div(image_sizes, side, rounding_mode="floor")
        sizes = torch.cat([listed, whole])[number]
        rows, columns = sizes.unbind(1)
        inside = (row.view(1, -1, 1) < rows.view(-1, 1, 1)) & (column.view(1, 1, -1) < columns.view(-1, 1, 1))
        index = self.in_blocks(inside)
        grid = pixel_values.view(images, channels, height // side, side, width // side, side).permute(0, 2, 4, 1, 3, 5)
        ends = (rows * columns).cumsum(0)
        bounds = torch.cat([ends[:1] * 0, ends])
        return grid.flatten(3, 5)[index.unbind(1)], index[:, 1:], bounds.to(torch.int32)

    def in_blocks(self, inside: Tensor) -> Tensor:
        """List image, row and column of the true values of (images, rows, columns), in the order of blocks: (patches, 3)."""
        if self.merge == 1:
            return inside.nonzero()
        images, rows, columns = inside.shape
        side = self.merge
        blocks = inside.view(images, rows // side, side, columns // side, side).transpose(2, 3)
        image, row, column, down, right = blocks.nonzero().unbind(1)
        return torch.stack([image, row * side + down, column * side + right], dim=1)
