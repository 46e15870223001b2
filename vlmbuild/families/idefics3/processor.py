"""Processors of Idefics3 and SmolVLM, and their files for transformers.js.

transformers' `SmolVLMProcessor` needs torchvision and num2words, for videos alone; `Idefics3Processor`, which writes the same
for images, takes its place, and videos are refused.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Idefics3Processor, SmolVLMProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    MAX_IMAGE_SIZE,
    _resize_output_size_rescale_to_max_len,
    _resize_output_size_scale_below_upper_bound,
)

from vlmbuild.families.batch import ImageCost
from vlmbuild.families.js import ClientFiles, image_settings, with_template
from vlmbuild.families.tiles import TileFamily

_SHARED = (
    "do_convert_rgb",
    "do_normalize",
    "do_pad",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "max_image_size",
    "resample",
    "rescale_factor",
    "video_sampling",
)
"""Settings that videos have in common with images."""


class ImageTextSmolVLMProcessor(Idefics3Processor):
    """Equivalent of transformers' `SmolVLMProcessor` for images."""

    def __call__(self, images: Any = None, text: Any = None, *, videos: Any = None, **options: Any) -> Any:
        """Process texts and images.

        Raises:
            ValueError: There are videos.
        """
        if videos is not None:
            raise ValueError("Videos of SmolVLM2 are not supported. Pass frames as images.")
        return super().__call__(images, text, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved, with the video processor's section, without which `AutoProcessor` fails."""
        return {**super().to_dict(), "video_processor": video_settings(self.image_processor.to_dict())}


ImageTextSmolVLMProcessor.__name__ = SmolVLMProcessor.__name__  # `save_pretrained` writes it, and every reader knows it


def video_settings(image: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the stock video processor that go with an image processor's."""
    shared = {key: image[key] for key in _SHARED if key in image}
    return {"size": dict(image["max_image_size"]), **shared, "video_processor_type": "SmolVLMVideoProcessor"}


class Idefics3Processing(TileFamily):
    """The part of the families that knows their processors."""

    processors: tuple[str, ...] = ("Idefics3Processor",)
    resizable_keys = ("longest_edge",)
    size_example = '{"longest_edge": 1024}'
    image_processor = "Idefics3ImageProcessor"
    tag_tokens = (8, 4)
    """Tokens of a tile's tag and of the whole image's: they are text to Llama 3's vocabulary."""

    def load_processor(self, directory: Path) -> Any:
        return self._opened(Idefics3Processor, directory)

    def _opened(self, processor_class: Any, directory: Path) -> Any:
        return processor_class.from_pretrained(directory, local_files_only=True, trust_remote_code=False, backend="pil")

    def processor_pixels(self, image_processor: Any) -> int:
        edge, side = int(image_processor.size["longest_edge"]), int(image_processor.max_image_size["longest_edge"])
        return (math.ceil(edge / side) ** 2 + 1) * side**2

    def media_tokens(self, processor: Any) -> frozenset[int]:
        known = processor.tokenizer.get_vocab()
        tags = (f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
        names = (processor.image_token, processor.fake_image_token, "<global-img>", *tags)
        return frozenset(known[name] for name in names if name in known)  # some vocabularies write tags as text

    def is_media(self, ids: Tensor, media: Tensor, placeholder: int) -> Tensor:
        """Include line breaks and tags, which stand next to placeholders."""
        found = super().is_media(ids, media, placeholder)
        return found | _beside(ids, found, placeholder) | _beside(ids.flip(1), found.flip(1), placeholder).flip(1)

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        rows, columns = tile_grid(processor.image_processor, height, width)
        short = copy.copy(processor)
        short.image_seq_len = 1
        text = short.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
        written = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        return written + (rows * columns + 1) * (int(processor.image_seq_len) - 1)

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        """Compute the cost of an image; see `Family.image_cost`. Two line breaks are one token in published vocabularies."""
        tile = self.tile(config)
        rows, columns = tile_grid(image_processor, height, width)
        tiles, (tag, whole) = rows * columns + 1, self.tag_tokens
        tokens = tiles * (tile.features + 1) + (tiles - 1) * tag + whole + rows + 1
        return ImageCost(tiles * tile.patches, tokens)

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        (name,) = self.processors
        settings = image_settings(files, name, self.image_processor, resample=1)
        processor = dict(files.get("processor_config.json", {}))
        for part in ("image_processor", "video_processor"):
            processor.pop(part, None)
        return {
            "config.json": values,
            "preprocessor_config.json": settings,
            "processor_config.json": {**processor, "processor_class": name},
            "tokenizer_config.json": with_template(files, template),
        }


class SmolVLMProcessing(Idefics3Processing):
    """The part of SmolVLM that knows its processor."""

    processors = ("SmolVLMProcessor",)
    image_processor = "SmolVLMImageProcessor"
    tag_tokens = (1, 1)

    def load_processor(self, directory: Path) -> Any:
        return self._opened(ImageTextSmolVLMProcessor, directory)

    def stock_files(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Add the section of the video processor, which a processor saved without torchvision lacks."""
        values = json.loads(files.get("processor_config.json", b"{}"))
        image = values.get("image_processor")
        if image is None or "video_processor" in values or "preprocessor_config.json" in files:
            return {}
        completed = {**values, "video_processor": video_settings(image)}
        return {"processor_config.json": (json.dumps(completed, indent=2, sort_keys=True) + "\n").encode()}


def _beside(ids: Tensor, media: Tensor, placeholder: int) -> Tensor:
    """Tell which tokens (batch, sequence) have a placeholder as the last token of media before them."""
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = index.masked_fill(~media, -1).cummax(1).values
    return (last >= 0) & (ids.gather(1, last.clamp(min=0)) == placeholder)


def tile_grid(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    """Count the rows and columns of tiles besides the whole image; 0 and 0 where that is the only one.

    This is not transformers' `get_number_of_image_patches`, which rounds differently from the processor where the longest edge
    is no multiple of a tile's.
    """
    if not image_processor.do_image_splitting:
        return 0, 0
    side = int(image_processor.max_image_size["longest_edge"])
    if image_processor.do_resize:
        edge = int(image_processor.size["longest_edge"])
        height, width = _resize_output_size_rescale_to_max_len(height, width, max_len=edge)
        most: Any = MAX_IMAGE_SIZE  # annotated wrongly
        height, width = _resize_output_size_scale_below_upper_bound(height, width, max_len=most)
    ratio = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = int(width / ratio)
    else:
        height = math.ceil(height / side) * side
        width = int(height * ratio)
    rows, columns = math.ceil(height / side), math.ceil(width / side)
    return (0, 0) if rows == columns == 1 else (rows, columns)
