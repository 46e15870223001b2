"""Qwen3-VL's processor: Qwen2-VL's for images; a video has a time for every frame, and all its frames share the pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.image_transforms import to_pil_image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import VideoMetadata, get_video_size

from vlmbuild.families.js import ClientFiles
from vlmbuild.families.qwen2_vl.processor import Floats, FrameProcessor, Qwen2VLProcessing, WithoutTorchvision

_ANY_SIZE = {"shortest_edge": 1, "longest_edge": 2**62}


class VideoFrameProcessor(FrameProcessor):
    """Equivalent of transformers' `Qwen3VLVideoProcessor`, with Pillow.

    Frames are sampled as there, unless `do_sample_frames` is false; without metadata they count as 24 a second.
    """

    stock_name = "Qwen3VLVideoProcessor"
    default_size: Mapping[str, int] = Qwen3VLVideoProcessor.size
    do_sample_frames = True
    fps = 2

    def sample_frames(self, metadata: VideoMetadata, **options: Any) -> Any:
        stock: Any = Qwen3VLVideoProcessor.sample_frames
        return stock(self, metadata, **options)

    def _patches(self, frames: Any, size: Any) -> tuple[Floats, list[int]]:
        height, width = smart_resize(
            len(frames),
            *get_video_size(frames),
            temporal_factor=self.temporal_patch_size,
            factor=self.image_processor.patch_size * self.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        pictures = [to_pil_image(frame).resize((width, height), self.image_processor.resample) for frame in frames]
        return super()._patches(pictures, _ANY_SIZE)


class FrameTextProcessor(WithoutTorchvision, Qwen3VLProcessor):
    """Qwen3-VL's processor where torchvision is missing."""

    frame_class = VideoFrameProcessor


class Qwen3VLProcessing(Qwen2VLProcessing):
    """The part of the family that knows its processor."""

    processors = ("Qwen3VLProcessor",)
    stock_processor = Qwen3VLProcessor
    frame_processor = FrameTextProcessor
    size_example = '{"shortest_edge": 4096, "longest_edge": 524288}'
    client_grids = "image_grid_thw"

    def is_media(self, ids: Tensor, media: Tensor, placeholder: int) -> Tensor:
        """Include the times before a video's frames: each frame has a start and an end of its own within the video's."""
        found = super().is_media(ids, media, placeholder)
        if not found.any():
            return found
        ends = ids[found].tolist()
        return torch.logical_or(found, (ids == ends[0]).cumsum(1) > (ids == ends[-1]).cumsum(1))

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        """Leave config.json nested, as it is published."""
        return {**super().client_files(values, files, template), "config.json": values}
