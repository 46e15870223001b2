"""Qwen3-VL's host prologue: positions are interpolated, and a video's frames are apart in the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from vlmbuild.families.grid import BatchImage
from vlmbuild.families.js import ClientVision
from vlmbuild.families.mrope import GridPrologue
from vlmbuild.families.qwen3_vl.processor import Qwen3VLProcessing
from vlmbuild.ir.program import Input

_TAPS = 4
"""Rows of the table of positions that bilinear interpolation mixes for a patch."""


class Qwen3VLPrologue(Qwen3VLProcessing):
    """The part of the family that reads batches."""

    def image_inputs(self, config: Any) -> tuple[Input, ...]:
        *others, positions, bounds = super().image_inputs(config)
        patches = positions.shape[0]
        return (
            *others,
            positions,
            bounds,
            Input("grid_indices", torch.int64, (patches, _TAPS)),
            Input("grid_weights", torch.float32, (patches, _TAPS)),
        )

    def vision_tensors(self, grids: Tensor, config: Any) -> dict[str, Tensor]:
        """Compute the rows of the learned grid that each patch mixes, and their weights, too."""
        vision = config.vision_config
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=int(vision.num_position_embeddings**0.5),
            mode="bilinear",
            align_corners=True,
            spatial_merge_size=vision.spatial_merge_size,
        )
        return {**super().vision_tensors(grids, config), "grid_indices": indices, "grid_weights": weights}

    def client_vision(self, config: Any) -> ClientVision | None:
        client = super().client_vision(config)
        assert client is not None
        side = int(config.vision_config.num_position_embeddings**0.5)
        prologue = InterpolatedPrologue(config.vision_config.spatial_merge_size, side)
        return replace(client, module=prologue, outputs=(*client.outputs, "grid_indices", "grid_weights"))

    def read_images(
        self, batch: Mapping[str, Tensor], config: Any, processor: Any
    ) -> tuple[list[BatchImage], Tensor | None]:
        """Read every frame of a video as an image of its own: the processor writes the time between them."""
        images, pixels = super().read_images(batch, config, processor)
        return [frame for image in images for frame in _frames(image)], pixels


class InterpolatedPrologue(GridPrologue):
    """The rows of the learned grid, `side` x `side`, that each patch mixes, and their weights, too."""

    def __init__(self, merge: int, side: int) -> None:
        super().__init__(merge)
        self.side = side

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        pixels, positions, bounds = super().forward(pixel_values, grid_thw)
        ends = (grid_thw[:, 0] * grid_thw[:, 1] * grid_thw[:, 2]).cumsum(0)
        image = (torch.arange(pixel_values.shape[0], device=grid_thw.device).unsqueeze(1) >= ends).sum(1)
        (up, above), (left, before) = (
            self._taps(positions[:, axis], grid_thw[:, 1 + axis][image]) for axis in range(2)
        )
        indices = (up.unsqueeze(2) * self.side + left.unsqueeze(1)).flatten(1)
        return pixels, positions, bounds, indices, (above.unsqueeze(2) * before.unsqueeze(1)).flatten(1)

    def _taps(self, index: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two nearest rows of the grid for each of `size` positions along an axis, and their weights."""
        last = (size - 1).clamp(min=1)
        low = torch.div(index * (self.side - 1), last, rounding_mode="floor")
        near = 1 - (index.float() * (self.side - 1) / last.float() - low.float())
        return torch.stack([low, (low + 1).clamp(max=self.side - 1)], 1), torch.stack([near, 1 - near], 1)


def _frames(image: BatchImage) -> list[BatchImage]:
    count, rows, columns = image.grid
    return [replace(image, grid=(1, rows, columns), offsets=np.arange(image.features // count))] * count
