"""The processor of Qwen2-VL and of models with its images and videos, and its files for transformers.js.

transformers' video processor needs torchvision; where that is missing, frames go through the image processor. In both cases
`vlmbuild.families.videos` decodes files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_utils import VideoMetadata, make_batched_metadata

from vlmbuild.families.gguf import GgufImages
from vlmbuild.families.js import ClientFiles, image_settings, with_template
from vlmbuild.families.mrope import MropeFamily
from vlmbuild.families.qwen2_vl import gguf
from vlmbuild.families.videos import list_videos, read_video, with_files

Floats = npt.NDArray[np.floating[Any]]

_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
"""Pixels of a frame, equal to those of the stock video processor."""


_SHARED = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "merge_size",
    "patch_size",
    "resample",
    "rescale_factor",
    "temporal_patch_size",
)
"""Settings that videos have in common with images."""

_VIDEO_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
"""Files in which the stock class finds the video processor's settings, if processor_config.json has none."""


def frame_size(directory: Path, default: Mapping[str, int] = _SIZE) -> dict[str, int]:
    """Read the pixels of a frame, as the stock video processor does: also from an image processor's file."""
    files = [directory / name for name in ("processor_config.json", *_VIDEO_FILES)]
    found = [json.loads(file.read_text()) if file.is_file() else {} for file in files]
    settings: Mapping[str, Any] = next(filter(None, (found[0].get("video_processor"), *found[1:])), {})
    size = dict(settings.get("size") or default)
    for limit, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if settings.get(limit) is not None:
            size[edge] = settings[limit]
    return {edge: size[edge] for edge in _SIZE}


class FrameProcessor:
    """Equivalent of transformers' `Qwen2VLVideoProcessor`, with Pillow.

    All frames are used, unless `do_sample_frames` is asked for; the last one twice if their number is odd.

    Attributes:
        stock_name: Name of transformers' class.
        default_size: Its pixels of a frame, least and most.
        do_sample_frames: Whether frames are chosen by default.
        min_frames, max_frames: Limits of the frames that are chosen by `fps`.
    """

    stock_name = "Qwen2VLVideoProcessor"
    default_size: Mapping[str, int] = _SIZE
    do_sample_frames = False
    min_frames, max_frames = 4, 768

    @classmethod
    def settings(cls, image: Mapping[str, Any], size: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the settings of the stock video processor that go with an image processor's."""
        shared = {key: image[key] for key in _SHARED if key in image}
        return {**shared, "size": dict(size or cls.default_size), "video_processor_type": cls.stock_name}

    def __init__(self, image_processor: Any, size: Mapping[str, int] = _SIZE) -> None:
        self.image_processor = image_processor
        self.merge_size: int = image_processor.merge_size
        self.temporal_patch_size: int = image_processor.temporal_patch_size
        self.size = dict(size)

    def __call__(
        self,
        videos: Any,
        return_tensors: str | None = None,
        size: Any = None,
        video_metadata: Any = None,
        return_metadata: bool = False,
        do_sample_frames: bool | None = None,
        fps: float | None = None,
        num_frames: int | None = None,
        **_unused: Any,
    ) -> BatchFeature:
        """Cut videos into patches.

        Args:
            videos: One video or several: lists of images, arrays (frames, height, width, channels), or paths of files.
            return_tensors: "pt", "np", or None for arrays.
            size: Least and most pixels of a frame, `shortest_edge` and `longest_edge`.
            video_metadata: What transformers' `VideoMetadata` holds of each video, "fps" for example; a file has its own.
            return_metadata: Whether it is returned.
            do_sample_frames: Whether some frames are chosen; else all are used. None for the class's default.
            fps: Frames a second to choose.
            num_frames: Frames to choose, instead.

        Returns:
            `pixel_values_videos` (patches, pixels) and `video_grid_thw` (videos, 3); `video_metadata` if asked for.

        Raises:
            ValueError: A file cannot be decoded.
        """
        videos = list_videos(videos)
        metadata = make_batched_metadata(videos, video_metadata=video_metadata)
        sampled = self.do_sample_frames if do_sample_frames is None else do_sample_frames
        choose = partial(self.sample_frames, num_frames=num_frames, fps=fps) if sampled else None
        for number, (video, facts) in enumerate(zip(videos, metadata, strict=True)):
            if isinstance(video, str):
                videos[number], metadata[number] = self.fetch_videos(video, sample_indices_fn=choose)
            elif choose is not None:
                facts.frames_indices = choose(metadata=facts)
                videos[number] = video[facts.frames_indices]
        patches, grids = zip(*(self._patches(frames, size or self.size) for frames in videos), strict=True)
        data = {"pixel_values_videos": np.concatenate(patches), "video_grid_thw": np.array(grids)}
        batch = BatchFeature(data, tensor_type=return_tensors)
        if return_metadata:
            batch["video_metadata"] = metadata
        return batch

    def fetch_videos(self, videos: Any, sample_indices_fn: Any = None) -> tuple[Any, Any]:
        """Decode files; see `read_video`."""
        return read_video(videos, sample_indices_fn)

    def sample_frames(
        self, metadata: VideoMetadata, *, num_frames: int | None = None, fps: float | None = None, **_unused: Any
    ) -> Any:
        """Choose frames as the stock class does, a multiple of `temporal_patch_size`; returns their numbers.

        Raises:
            ValueError: Neither or both of `num_frames` and `fps` are given, or the video is too short or of unknown speed.
        """
        total, depth = metadata.total_num_frames, self.temporal_patch_size
        if (num_frames is None) == (fps is None):
            raise ValueError("Choosing frames needs one of fps and num_frames. Pass one, or do_sample_frames=False")
        if num_frames is not None:
            count = round(num_frames / depth) * depth
        elif metadata.fps is None:
            raise ValueError("fps needs a video's own frames a second. Pass it in video_metadata, or pass num_frames")
        else:
            wanted = max(total / metadata.fps * (fps or 0), self.min_frames)
            count = math.floor(min(wanted, min(self.max_frames, total) // depth * depth) / depth) * depth
        if not 0 < count <= total:
            raise ValueError(f"{count} frames cannot be chosen of a video that has {total}. Change fps or num_frames")
        return torch.arange(0, total, total / count).int()

    def _patches(self, frames: Any, size: Any) -> tuple[Floats, list[int]]:
        images = self.image_processor(self._even(list(frames)), size=dict(size), return_tensors="np")
        grids, depth = images["image_grid_thw"], self.temporal_patch_size
        _, height, width = (int(side) for side in grids[0])
        area = self.image_processor.patch_size**2
        # An image stands for `depth` equal frames; here, each of them comes from a frame of its own.
        count = len(grids) // depth
        single = images["pixel_values"].reshape(count, depth, height * width, -1, depth, area)[..., 0, :]
        return np.moveaxis(single, 1, 3).reshape(-1, single.shape[3] * depth * area), [count, height, width]

    def _even(self, frames: Sequence[Any]) -> list[Any]:
        missing = -len(frames) % self.temporal_patch_size
        return [*frames, *[frames[-1]] * missing]


class WithoutTorchvision:
    """The part of a processor class that replaces its video processor where torchvision is missing; put it before the stock
    class.

    Attributes:
        frame_class: Class of the video processor in its place.
        frame_size: Least and most pixels of a frame; None for the class's own.
    """

    frame_class: type[FrameProcessor] = FrameProcessor
    frame_size: Mapping[str, int] | None = None
    image_processor: Any

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        stock: Any = super()
        stock.__init__(image_processor, tokenizer, chat_template=chat_template)

    def __init_subclass__(cls) -> None:
        if WithoutTorchvision in cls.__bases__:  # a class made of the result has its name
            cls.__name__ = cls.__bases__[1].__name__  # `save_pretrained` writes it, and every reader knows it

    @property  # an attribute would be saved, as a class that no other reader knows
    def video_processor(self) -> FrameProcessor:
        return self.frame_class(self.image_processor, self.frame_size or self.frame_class.default_size)

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved, with the video processor's section, without which `AutoProcessor` fails."""
        stock: Any = super()
        values: dict[str, Any] = stock.to_dict()
        values.pop("frame_size", None)
        return {**values, "video_processor": self.frame_class.settings(self.image_processor.to_dict(), self.frame_size)}


class ImageTextProcessor(WithoutTorchvision, Qwen2VLProcessor):
    """Qwen2-VL's processor where torchvision is missing."""


class Qwen2VLProcessing(MropeFamily):
    """The part of a family that knows its processor.

    Attributes:
        stock_processor: transformers' class.
        frame_processor: The class without torchvision.
    """

    processors: tuple[str, ...] = ("Qwen2VLProcessor",)
    stock_processor: Any = Qwen2VLProcessor
    frame_processor: Any = ImageTextProcessor

    def load_processor(self, directory: Path) -> Any:
        stock = is_torchvision_available() and _has_video_processor(directory)
        processor_class = self.stock_processor if stock else self.frame_processor
        processor = processor_class.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if stock:
            with_files(processor.video_processor)
        else:
            processor.frame_size = frame_size(directory, processor.frame_class.default_size)
        return processor

    def stock_files(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Add the section of the video processor, which a processor saved without torchvision lacks."""
        values = json.loads(files.get("processor_config.json", b"{}"))
        image = values.get("image_processor")
        if image is None or "video_processor" in values or any(name in files for name in _VIDEO_FILES):
            return {}
        completed = {**values, "video_processor": self.frame_processor.frame_class.settings(image)}
        return {"processor_config.json": (json.dumps(completed, indent=2, sort_keys=True) + "\n").encode()}

    def limited_size(self, processor: Any, height: int, width: int, limits: Mapping[str, Any]) -> tuple[int, int]:
        """Compute the size as `qwen_vl_utils` does."""
        for key, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} must be a whole number, at least 1, not {value!r}")
        images = processor.image_processor
        factor, low, high = images.patch_size * images.merge_size, *(images.size[k] for k in _SIZE)
        if set(limits) == {"resized_height", "resized_width"}:
            size = smart_resize(limits["resized_height"], limits["resized_width"], factor, 1, 2**62)
        elif set(limits) <= {"min_pixels", "max_pixels"}:
            most = limits.get("max_pixels", high)
            least = limits.get("min_pixels", min(low, most))
            if least > most:
                raise ValueError(f"min_pixels {least} is above max_pixels {most}")
            size = smart_resize(height, width, factor, least, most)
        else:
            raise ValueError(f"{', '.join(limits)} do not go together")
        if smart_resize(size[0], size[1], factor, low, high) != size:
            raise ValueError(
                f"{size[0]} x {size[1]} is what it asks for, but the processor allows {low} to {high} pixels"
            )
        return int(size[0]), int(size[1])

    def grid_size(self, image_processor: Any, height: int, width: int) -> tuple[int, int]:
        """Count the rows and columns of patches of an image of this size (in pixels, before it is resized)."""
        patch = image_processor.patch_size
        limits = (image_processor.size[key] for key in _SIZE)
        rows, columns = smart_resize(height, width, patch * image_processor.merge_size, *limits)
        return int(rows // patch), int(columns // patch)

    def media_tokens(self, processor: Any) -> frozenset[int]:
        ends = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
        return frozenset({processor.image_token_id, processor.video_token_id, *ends})

    def gguf_images(self, config: Any, processor: Any) -> GgufImages:
        return gguf.images(processor)

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        """Write config.json flat, as it is published."""
        text = values.get("text_config", {})
        rope = text.get("rope_parameters", values.get("rope_parameters"))
        nested = ("text_config", "rope_parameters")
        flat = {**text, **{key: value for key, value in values.items() if key not in nested}}
        if rope is not None:
            flat |= {
                "rope_theta": rope.get("rope_theta"),
                "rope_scaling": {**rope, "type": "mrope", "rope_type": "default"},
            }
            flat.pop("rope_parameters", None)
        return {
            "config.json": {**flat, "model_type": self.config_class.model_type},
            "preprocessor_config.json": image_settings(files, self.processors[0], "Qwen2VLImageProcessor"),
            "tokenizer_config.json": with_template(files, template),
        }


def _has_video_processor(directory: Path) -> bool:
    """Tell whether the stock class would load: a processor that was saved without torchvision has no video processor."""
    if any((directory / name).is_file() for name in _VIDEO_FILES):
        return True
    combined = directory / "processor_config.json"
    return combined.is_file() and "video_processor" in json.loads(combined.read_text())
