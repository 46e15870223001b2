"""Qwen3-VL's processor: Qwen2-VL's for images; a video has a time for every frame, and all its frames share the pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import get_video_size, make_batched_metadata, make_batched_videos

from vlmbuild.families.js import ClientFiles
from vlmbuild.families.qwen2_vl.processor import Floats, FrameProcessor, Qwen2VLProcessing, WithoutTorchvision

_ANY_SIZE = {"shortest_edge": 1, "longest_edge": 2**62}


class VideoFrameProcessor(FrameProcessor):
    """Equivalent of transformers' `Qwen3VLVideoProcessor` for videos that are passed as frames, with Pillow.

    Frames are sampled as there, unless `do_sample_frames` is false; without metadata they count as 24 a second.
    """

    stock_name = "Qwen3VLVideoProcessor"
    default_size: Mapping[str, int] = Qwen3VLVideoProcessor.size
    fps, min_frames, max_frames = 2, 4, 768

    def __call__(  # type: ignore[override]  # its other options are among these
        self,
        videos: Any,
        *,
        video_metadata: Any = None,
        do_sample_frames: bool = True,
        fps: float | None = None,
        num_frames: int | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Sample the frames, then cut them into patches; see `FrameProcessor`.

        Args:
            videos: One video or several: lists of images, or arrays (frames, height, width, channels).
            video_metadata: A mapping for each video, with `fps` and `total_num_frames`.
            do_sample_frames: Whether some frames are chosen; else all are used.
            fps: Frames a second to choose.
            num_frames: Frames to choose, instead.
            options: Options of `FrameProcessor`.
        """
        videos = make_batched_videos(videos)
        metadata = make_batched_metadata(videos, video_metadata=video_metadata)
        for number, (video, facts) in enumerate(zip(videos, metadata, strict=True)):
            if do_sample_frames and isinstance(video, np.ndarray):
                stock: Any = Qwen3VLVideoProcessor.sample_frames
                facts.frames_indices = stock(self, facts, num_frames=num_frames, fps=fps)
                videos[number] = video[facts.frames_indices]
        return super().__call__(videos, video_metadata=metadata, **options)

    def _patches(self, frames: Any, size: Any) -> tuple[Floats, list[int]]:
        if not isinstance(frames, np.ndarray):
            return super()._patches(frames, size)  # refuses it
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

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        """Leave config.json nested, as it is published."""
        return {**super().client_files(values, files, template), "config.json": values}
