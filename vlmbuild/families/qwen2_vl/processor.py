"""Qwen2-VL's processor without torchvision: its own video processor needs it, so frames go through the image processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import BatchFeature
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_utils import make_batched_videos

Floats = npt.NDArray[np.floating[Any]]

_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
"""Pixels of a frame, as the stock video processor has them."""


class FrameProcessor:
    """Does for videos given as frames what transformers' `Qwen2VLVideoProcessor` does, with Pillow.

    Frames are not sampled: all that are passed are used, the last one twice if their number is odd.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.merge_size: int = image_processor.merge_size
        self.size = dict(_SIZE)

    def __call__(
        self, videos: Any, return_tensors: str | None = None, size: Any = None, **_unused: Any
    ) -> BatchFeature:
        """
        Args:
            videos: One video or several: lists of images, or arrays (frames, height, width, channels).
            return_tensors: "pt", "np", or None for arrays.
            size: Least and most pixels of a frame, `shortest_edge` and `longest_edge`.

        Returns:
            `pixel_values_videos` (patches, pixels) and `video_grid_thw` (videos, 3).

        Raises:
            ValueError: A video is a path: decoding needs torchvision.
        """
        made = [self._patches(frames, size or self.size) for frames in make_batched_videos(videos)]
        data = {
            "pixel_values_videos": np.concatenate([m[0] for m in made]),
            "video_grid_thw": np.array([m[1] for m in made]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _patches(self, frames: Any, size: Any) -> tuple[Floats, list[int]]:
        if isinstance(frames, str | Path):
            raise ValueError(
                f"Decoding {frames} needs torchvision, which is not installed; pass the video as a list of its frames."
            )
        made = self.image_processor(self._even(list(frames)), size=dict(size), return_tensors="np")
        grids, depth = made["image_grid_thw"], self.image_processor.temporal_patch_size
        _, height, width = (int(side) for side in grids[0])
        area = self.image_processor.patch_size**2
        # An image stands for `depth` equal frames; here, each of them comes from a frame of its own.
        single = made["pixel_values"].reshape(len(grids) // depth, depth, height * width, -1, depth, area)[..., 0, :]
        return np.moveaxis(single, 1, 3).reshape(-1, single.shape[3] * depth * area), [
            len(grids) // depth,
            height,
            width,
        ]

    def _even(self, frames: Sequence[Any]) -> list[Any]:
        missing = -len(frames) % self.image_processor.temporal_patch_size
        return [*frames, *[frames[-1]] * missing]


class ImageTextProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor where torchvision is missing."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]

    @property  # an attribute would be saved, as a class that no other reader knows
    def video_processor(self) -> FrameProcessor:
        return FrameProcessor(self.image_processor)


ImageTextProcessor.__name__ = Qwen2VLProcessor.__name__  # what `save_pretrained` writes, and every reader knows


def load(directory: Path) -> Any:
    """The processor in `directory`; raises what transformers raises for bad files."""
    stock = is_torchvision_available() and _has_video_processor(directory)
    processor_class: Any = Qwen2VLProcessor if stock else ImageTextProcessor
    return processor_class.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _has_video_processor(directory: Path) -> bool:
    """A processor that was saved where torchvision was missing has none, and the stock class would not load."""
    if any((directory / name).is_file() for name in ("preprocessor_config.json", "video_preprocessor_config.json")):
        return True
    combined = directory / "processor_config.json"
    return combined.is_file() and "video_processor" in json.loads(combined.read_text())
