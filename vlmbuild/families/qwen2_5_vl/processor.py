"""Qwen2.5-VL's processor: Qwen2-VL's, and the seconds between the frames of a video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

from vlmbuild.families.js import ClientFiles
from vlmbuild.families.qwen2_vl.processor import Qwen2VLProcessing, WithoutTorchvision


class FrameTextProcessor(WithoutTorchvision, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor where torchvision is missing."""


class Qwen25VLProcessing(Qwen2VLProcessing):
    """The part of the family that knows its processor."""

    processors = ("Qwen2_5_VLProcessor",)
    stock_processor = Qwen2_5_VLProcessor
    frame_processor = FrameTextProcessor

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        """Write config.json with the text's values in a part of their own, as clients read this family's."""
        flat = {key: value for key, value in values.items() if key != "vision_config"}
        text = {**values.get("text_config", flat), "model_type": "qwen2_5_vl_text"}
        return {**super().client_files(values, files, template), "config.json": {**values, "text_config": text}}
