"""Gemma 3's processor: images as squares, crops of pan and scan as further images, files for transformers.js."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma3Processor

from vlmbuild.families.batch import ImageCost
from vlmbuild.families.js import ClientFiles, image_settings, with_template
from vlmbuild.families.tiles import TileFamily

_TOKENS = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
_BILINEAR = 2
_AROUND = 4
"""Tokens around those of an image: its begin and its end, and line breaks."""
_SENTENCE = 17
"""Tokens of the text that introduces an image and its crops, with the published vocabulary."""


class Gemma3Processing(TileFamily):
    """The part of the family that knows its processor."""

    processors = ("Gemma3Processor",)
    size_example = ""
    client_template_file = True

    def load_processor(self, directory: Path) -> Any:
        return Gemma3Processor.from_pretrained(directory, local_files_only=True, trust_remote_code=False, backend="pil")

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        """Write out sizes for which clients have no defaults, and the names of an image's tokens."""
        processor = dict(files.get("processor_config.json", {}))
        images = {**processor.pop("image_processor", {}), **files.get("preprocessor_config.json", {})}
        tokenizer, text = with_template(files, template), self.config(values).text_config
        sizes = {name: getattr(text, name) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")}
        named = tokenizer.get("extra_special_tokens")
        known = tokenizer.get("model_specific_special_tokens") or (named if isinstance(named, dict) else {})
        length = {"image_seq_length": values.get("mm_tokens_per_image", 256)}
        return {
            "config.json": {**values, "text_config": {**values["text_config"], **sizes}},
            "preprocessor_config.json": image_settings(
                files, "Gemma3Processor", "Gemma3ImageProcessor", images.get("resample", _BILINEAR)
            ),
            "processor_config.json": {**length, **processor, "processor_class": "Gemma3Processor"},
            "tokenizer_config.json": {**_TOKENS, **known, **tokenizer},
        }

    def processor_pixels(self, image_processor: Any) -> int:
        crops = image_processor.pan_and_scan_max_num_crops or 0 if image_processor.do_pan_and_scan else 0
        return int(image_processor.size["height"] * image_processor.size["width"]) * (1 + crops)

    def media_tokens(self, processor: Any) -> frozenset[int]:
        tokenizer = processor.tokenizer
        return frozenset((tokenizer.boi_token_id, tokenizer.image_token_id, tokenizer.eoi_token_id))

    def is_media(self, ids: Tensor, media: Tensor, placeholder: int) -> Tensor:
        """Include the line breaks before and after an image."""
        found = super().is_media(ids, media, placeholder)
        pad = torch.nn.functional.pad
        return found | pad(found, (1, 0))[:, :-1] | pad(found, (0, 1))[:, 1:]

    def joined_tokens(self, processor: Any) -> frozenset[int]:
        breaks = processor.tokenizer.convert_tokens_to_ids(["\n" * count for count in range(1, 32)])
        return frozenset(breaks) - {processor.tokenizer.unk_token_id}

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        text = processor.replace_image_token({"num_crops": [crops(processor.image_processor, height, width)]}, 0)
        return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        tile, count = self.tile(config), crops(image_processor, height, width)
        tokens = (1 + count) * (tile.features + _AROUND) + (_SENTENCE + count - 1 if count else 0)
        return ImageCost((1 + count) * tile.patches, tokens, segments=1 + count)


def crops(image_processor: Any, height: int, width: int) -> int:
    """Count the crops that pan and scan adds to an image of this size."""
    if not image_processor.do_pan_and_scan:
        return 0
    names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
    limits = {f"pan_and_scan_{name}": getattr(image_processor, f"pan_and_scan_{name}") for name in names}
    image = np.broadcast_to(np.uint8(0), (3, height, width))  # only its shape is read; this one takes no memory
    return len(image_processor.pan_and_scan(image, **limits))
