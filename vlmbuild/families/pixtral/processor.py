"""Pixtral's processor without torchvision: transformers replaces its own class by a dummy where torchvision is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

_IMAGE, _BREAK, _END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"


class ImageTextPixtralProcessor(ProcessorMixin):
    """Does what transformers' `PixtralProcessor` does, with the image processor that needs Pillow only."""

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
        height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        return self._placeholders(height // self._unit, width // self._unit)

    def _placeholders(self, rows: int, columns: int) -> str:
        row = self.image_token * columns
        return self.image_break_token.join([row] * rows) + self.image_end_token

    @property
    def _unit(self) -> int:
        """Pixels along the side of what becomes one token: image sides are rounded up to multiples of it."""
        return self.patch_size * self.spatial_merge_size

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        return super()._process_images(images, **{**kwargs, "patch_size": self._unit})

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        # Where a class declares its defaults differs between transformers 5.20 and 5.23; what is merged does not.
        merged = super()._merge_kwargs(*args, **kwargs)
        for part in ("text_kwargs", "images_kwargs"):
            merged[part].setdefault("return_tensors", "pt")
        return merged

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        size = kwargs.get("size") or kwargs.get("images_kwargs", {}).get("size") or self.image_processor.size
        tokens = [self._token_count(height, width, size["longest_edge"]) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(tokens))

    def _token_count(self, height: int, width: int, longest_edge: int) -> int:
        resized_height, resized_width = get_resize_output_image_size(
            np.broadcast_to(np.uint8(0), (height, width, 3)),  # only its shape is read; this one takes no memory
            size=(longest_edge, longest_edge),
            patch_size=(self._unit, self._unit),
            input_data_format=ChannelDimension.LAST,
        )
        return int(resized_height // self._unit * (resized_width // self._unit + 1))


# What `save_pretrained` writes, and every reader knows; `from_pretrained` chooses the tokenizer's class by it too.
ImageTextPixtralProcessor.__name__ = "PixtralProcessor"


def load(directory: Path) -> Any:
    """The processor in `directory`; raises what transformers raises for bad files."""
    processor_class: Any = ImageTextPixtralProcessor
    if is_torchvision_available():
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor

        processor_class = PixtralProcessor
    return processor_class.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
