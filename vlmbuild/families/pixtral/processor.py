"""Pixtral's processor, which other families have with merged patches, and its files for transformers.js.

transformers replaces its own class by a dummy where torchvision is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

from vlmbuild.families.batch import ImageCost
from vlmbuild.families.js import ClientFiles, image_settings, with_template
from vlmbuild.families.packed_patches import PackedPatchFamily

_IMAGE, _BREAK, _END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"


class ImageTextPixtralProcessor(ProcessorMixin):
    """Equivalent of transformers' `PixtralProcessor`, with the image processor that needs Pillow only."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: Any = None,
        image_token: str = _IMAGE,
        image_break_token: str = _BREAK,
        image_end_token: str = _END,
        **_unknown: Any,  # the stock class accepts, and drops, what it does not know
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.image_break_token_id: int = tokenizer.convert_tokens_to_ids(image_break_token)
        self.image_end_token_id: int = tokenizer.convert_tokens_to_ids(image_end_token)

    @property  # type: ignore[misc]  # without a setter, as in the stock class
    def image_token_ids(self) -> list[int]:  # type: ignore[override]
        return [self.image_token_id, self.image_break_token_id, self.image_end_token_id]

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "image_sizes"]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        height, width = (int(side) // feature_side(self) for side in image_inputs["image_sizes"][image_idx])
        return self.image_break_token.join([self.image_token * width] * height) + self.image_end_token

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        return super()._process_images(images, **{**kwargs, "patch_size": feature_side(self)})

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        # Where a class declares its defaults differs between transformers 5.20 and 5.23; what is merged does not.
        merged = super()._merge_kwargs(*args, **kwargs)
        for part in ("text_kwargs", "images_kwargs"):
            merged[part].setdefault("return_tensors", "pt")
        return merged


# `save_pretrained` writes it, and every reader knows it; `from_pretrained` chooses the tokenizer's class by it too.
ImageTextPixtralProcessor.__name__ = "PixtralProcessor"


class PixtralProcessing(PackedPatchFamily):
    """The part of a family that knows its processor.

    Attributes:
        merges_patches: Whether the processor is one with merged patches.
    """

    processors = ("PixtralProcessor",)
    merges_patches = False

    def has_processor(self, processor: Any) -> bool:
        return super().has_processor(processor) and (processor.spatial_merge_size > 1) == self.merges_patches

    def load_processor(self, directory: Path) -> Any:
        processor_class: Any = ImageTextPixtralProcessor
        if is_torchvision_available():
            from transformers.models.pixtral.processing_pixtral import PixtralProcessor

            processor_class = PixtralProcessor
        processor = processor_class.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if not self.has_processor(processor):
            side = processor.spatial_merge_size
            raise ValueError(f"spatial_merge_size {side} belongs to another model than {self.title}.")
        return processor

    def processor_pixels(self, image_processor: Any) -> int:
        return int(image_processor.size["longest_edge"]) ** 2

    def media_tokens(self, processor: Any) -> frozenset[int]:
        return frozenset(processor.image_token_ids)

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        edge = processor.image_processor.size["longest_edge"]
        rows, columns = rows_and_columns(edge, feature_side(processor), height, width)
        return rows * (columns + 1)  # a break or the end after every row

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        edge, merge = image_processor.size["longest_edge"], self.patch_layout(config)[1]
        rows, columns = rows_and_columns(edge, config.vision_config.patch_size * merge, height, width)
        return ImageCost(rows * columns * merge**2, rows * (columns + 1))

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        """Write patch sizes as numbers."""
        processor = dict(files.get("processor_config.json", {}))
        processor.pop("image_processor", None)
        settings = image_settings(files, "PixtralProcessor", "PixtralImageProcessor")
        patch = settings.get("patch_size", processor.get("patch_size"))
        sizes = {
            "patch_size": patch["height"] if isinstance(patch, Mapping) else patch,
            "spatial_merge_size": processor.get("spatial_merge_size", 1),
        }
        tokens = {"image_token": _IMAGE, "image_break_token": _BREAK, "image_end_token": _END}
        image_token = values.get("image_token_index", values.get("image_token_id"))
        return {
            "config.json": {**values, "image_token_index": image_token},
            "preprocessor_config.json": settings | sizes,
            "processor_config.json": {**tokens, **processor, "processor_class": "PixtralProcessor", **sizes},
            "tokenizer_config.json": with_template(files, template),
        }


def feature_side(processor: Any) -> int:
    """Compute the side in pixels of the square that becomes one feature."""
    return int(processor.patch_size * processor.spatial_merge_size)


def rows_and_columns(edge: int, unit: int, height: int, width: int) -> tuple[int, int]:
    """Count the rows and columns of squares with `unit` pixels a side, once the image is resized to the longest edge.

    Raises:
        ValueError: None is left.
    """
    image = np.broadcast_to(np.uint8(0), (height, width, 3))  # only its shape is read; this one takes no memory
    sides = get_resize_output_image_size(image, (edge, edge), (unit, unit), ChannelDimension.LAST)
    rows, columns = (int(side) // unit for side in sides)
    if not rows or not columns:
        raise ValueError(f"scaled down to an edge of {edge} pixels, nothing is left of it")
    return rows, columns
