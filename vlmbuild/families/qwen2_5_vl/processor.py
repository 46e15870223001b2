"""Qwen2.5-VL's processor: Qwen2-VL's, and the seconds between the frames of a video."""

from __future__ import annotations

from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

from vlmbuild.families.qwen2_vl.processor import Qwen2VLProcessing, WithoutTorchvision


class FrameTextProcessor(WithoutTorchvision, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor where torchvision is missing."""


class Qwen25VLProcessing(Qwen2VLProcessing):
    """The part of the family that knows its processor."""

    processors = ("Qwen2_5_VLProcessor",)
    stock_processor = Qwen2_5_VLProcessor
    frame_processor = FrameTextProcessor
