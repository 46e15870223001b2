"""Qwen2.5-VL's host prologue: the order of windows, two bounds, and the time of videos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from vlmbuild.errors import BatchError
from vlmbuild.families.base import InputLayout
from vlmbuild.families.batch import ImageCost, repeat_end
from vlmbuild.families.grid import FEATURE_ORDER
from vlmbuild.families.js import ClientVision
from vlmbuild.families.qwen2_5_vl.processor import Qwen25VLProcessing
from vlmbuild.ir.program import Input

_TIMES = "second_per_grid_ts"


class Qwen25VLPrologue(Qwen25VLProcessing):
    """The part of the family that reads batches."""

    client_grids = "image_grid_thw"
    input_layout: Mapping[str, InputLayout] = {**Qwen25VLProcessing.input_layout, _TIMES: "medium"}

    def image_inputs(self, config: Any) -> tuple[Input, ...]:
        return (*super().image_inputs(config), Input("vision_window_cu_seqlens", torch.int32, ("segments",)))

    def vision_tensors(self, grids: Tensor, config: Any) -> dict[str, Tensor]:
        """Compute the bounds of windows too, and as many of images: the last one is repeated. All blocks are one graph."""
        tensors, vision = super().vision_tensors(grids, config), config.vision_config
        order, bounds = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        windows, images = repeat_end(bounds), tensors["vision_cu_seqlens"]
        images = torch.cat([images, images[-1:].expand(len(windows) - len(images))])
        return {
            **tensors,
            "vision_cu_seqlens": images,
            "vision_window_cu_seqlens": windows,
            FEATURE_ORDER: order,
        }

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        cost, vision = super().image_cost(image_processor, config, height, width), config.vision_config
        rows, columns = self.grid_size(image_processor, height, width)
        side = window_side(vision) * vision.spatial_merge_size
        return cost._replace(segments=math.ceil(rows / side) * math.ceil(columns / side))

    def video_times(self, batch: Mapping[str, Tensor], videos: int) -> dict[str, Any]:
        times = batch.get(_TIMES)
        if times is None:
            return {}
        seconds = torch.as_tensor(times).cpu()
        if seconds.shape != (videos,) or not (seconds.isfinite() & (seconds >= 0)).all():
            raise BatchError(
                f"{_TIMES} is {seconds.tolist()}, but the batch has {videos} videos, each of which needs the seconds between "
                "two of its frames. Pass everything that the processor returned."
            )
        return {_TIMES: seconds if isinstance(times, Tensor) else times}  # numbers are multiplied in another precision

    def client_vision(self, config: Any) -> ClientVision | None:
        client, vision = super().client_vision(config), config.vision_config
        if client is None:
            return None
        prologue = WindowPrologue(vision.spatial_merge_size, window_side(vision))
        return ClientVision(
            client.inputs, prologue, (*client.outputs, "vision_window_cu_seqlens", FEATURE_ORDER), restores=True
        )


def window_side(vision: Any) -> int:
    """Return the features along a side of a window."""
    return int(vision.window_size // vision.spatial_merge_size // vision.patch_size)


class WindowPrologue(nn.Module):
    """Patches in the order of windows, the row and column of each, the bounds of frames and of windows, and the place of every
    feature in that order; from grids alone, equal to `Qwen25VL.prepare`.

    A window is `side` x `side` features, or what is left of them at the edges. Within a frame, windows lie row by row.
    """

    def __init__(self, merge: int, side: int) -> None:
        super().__init__()
        self.merge = merge
        self.side = side

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        frames, rows, columns = grid_thw.unbind(1)
        rows, columns = _quotient(rows, self.merge), _quotient(columns, self.merge)
        ends = (frames * rows * columns).cumsum(0)
        feature = torch.arange(pixel_values.shape[0] // self.merge**2, device=grid_thw.device)
        image = (feature.unsqueeze(1) >= ends).sum(1)
        height, width = rows[image], columns[image]
        within = (feature - (ends - frames * rows * columns)[image]) % (height * width)
        first = feature - within  # of the frame

        row, column, inside = self._unwind(within, height, width)
        corner = torch.arange(self.merge**2, device=grid_thw.device)
        patch = ((first + row * width + column).unsqueeze(1) * self.merge**2 + corner).flatten()
        down, across = _quotient(corner, self.merge), corner % self.merge
        places = torch.stack(
            [row.unsqueeze(1) * self.merge + down, column.unsqueeze(1) * self.merge + across], dim=-1
        ).flatten(0, 1)
        bounds = (
            (torch.cat([(zero == 0).nonzero().squeeze(1), feature[-1:] + 1]) * self.merge**2).to(torch.int32)
            for zero in (within, inside)
        )
        return pixel_values[patch], places, *bounds, first + self._wind(within, height, width)

    def _unwind(self, within: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the row and column of the features of frames in the order of windows, and their number in the window."""
        top = _quotient(within, self.side * width) * self.side
        within = within - top * width
        high = (height - top).clamp(max=self.side)
        left = _quotient(within, self.side * high) * self.side
        within = within - left * high
        wide = (width - left).clamp(max=self.side)
        return top + _quotient(within, wide), left + within % wide, within

    def _wind(self, within: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Compute the number in the order of windows of the features of frames in the order of rows."""
        row, column = _quotient(within, width), within % width
        top, left = row - row % self.side, column - column % self.side
        high, wide = (height - top).clamp(max=self.side), (width - left).clamp(max=self.side)
        number: Tensor = top * width + left * high + (row - top) * wide + column - left
        return number


def _quotient(one: Any, other: Any) -> Any:
    return torch.div(one, other, rounding_mode="floor")
