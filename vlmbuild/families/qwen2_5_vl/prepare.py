"""Qwen2.5-VL's host prologue: the order of windows, two bounds, and the time of videos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vlmbuild.errors import BatchError
from vlmbuild.families.base import InputLayout
from vlmbuild.families.batch import ImageCost, repeat_end
from vlmbuild.families.grid import FEATURE_ORDER
from vlmbuild.families.qwen2_5_vl.processor import Qwen25VLProcessing
from vlmbuild.ir.program import Input

_TIMES = "second_per_grid_ts"


class Qwen25VLPrologue(Qwen25VLProcessing):
    """The part of the family that reads batches."""

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
        return {_TIMES: seconds}


def window_side(vision: Any) -> int:
    """Return the features along a side of a window."""
    return int(vision.window_size // vision.spatial_merge_size // vision.patch_size)
