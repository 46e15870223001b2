"""Qwen2-VL's vision prologue as a graph, and its files as transformers.js reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmbuild.families.js import ClientFiles, ClientVision, first_given, image_settings, with_template
from vlmbuild.ir.program import Input


class GridPrologue(nn.Module):
    """Row and column of every patch and the bounds of frames, from grids alone; equal to `_qwen2_vl_host.prepare`.

    Patches stand block by block, `merge` x `merge` of them.
    """

    def __init__(self, merge: int) -> None:
        super().__init__()
        self.merge = merge

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        frames, rows, columns = grid_thw.unbind(1)
        of_frame = rows * columns
        ends = (frames * of_frame).cumsum(0)
        patch = torch.arange(pixel_values.shape[0], device=grid_thw.device)
        medium = (patch.unsqueeze(1) >= ends).sum(1)
        place = (patch - (ends - frames * of_frame)[medium]) % of_frame[medium]
        block = torch.div(place, self.merge**2, rounding_mode="floor")
        corner = place % self.merge**2
        across = torch.div(columns, self.merge, rounding_mode="floor")[medium]
        row = torch.div(block, across, rounding_mode="floor") * self.merge
        row = row + torch.div(corner, self.merge, rounding_mode="floor")
        column = block % across * self.merge + corner % self.merge
        starts = (place == 0).nonzero().squeeze(1)
        bounds = torch.cat([starts, patch[-1:] + 1])
        return pixel_values, torch.stack([row, column], dim=1), bounds.to(torch.int32)


def client_vision(config: Any) -> ClientVision:
    """What takes `grid_thw` (images, 3) beside the patches."""
    vision = config.vision_config
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return ClientVision(
        (
            Input("pixel_values", torch.float32, (f"{vision.spatial_merge_size**2}*merged", pixels)),
            Input("grid_thw", torch.int64, ("images", 3)),
        ),
        GridPrologue(vision.spatial_merge_size),
        ("pixel_values", "vision_position_ids", "vision_cu_seqlens"),
    )


def client_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A processor's images and videos, in the order in which `prepare` numbers their features."""
    pixels = first_given(batch, "pixel_values", "pixel_values_videos")
    grids = first_given(batch, "image_grid_thw", "video_grid_thw")
    return {"pixel_values": torch.cat(pixels).float(), "grid_thw": torch.cat(grids).long()}


def client_files(values: Mapping[str, Any], files: ClientFiles, template: str | None) -> dict[str, Mapping[str, Any]]:
    """config.json flat, as published; image settings with what transformers.js has other defaults for."""
    text = values.get("text_config", {})
    rope = text.get("rope_parameters", values.get("rope_parameters"))
    flat = {**text, **{key: value for key, value in values.items() if key not in ("text_config", "rope_parameters")}}
    if rope is not None:
        flat |= {
            "rope_theta": rope.get("rope_theta"),
            "rope_scaling": {**rope, "type": "mrope", "rope_type": "default"},
        }
        flat.pop("rope_parameters", None)
    flat["model_type"] = "qwen2_vl"
    images = {
        **image_settings(files),
        "processor_class": "Qwen2VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
    }
    return {
        "config.json": flat,
        "preprocessor_config.json": images,
        "tokenizer_config.json": with_template(files, template),
    }
