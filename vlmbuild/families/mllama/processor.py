"""Llama 3.2 Vision's processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import MllamaProcessor
from transformers.utils.import_utils import is_torchvision_available

from vlmbuild.families.base import Family


class MllamaProcessing(Family):
    """The part of the family that knows its processor."""

    processors = ("MllamaProcessor",)

    def load_processor(self, directory: Path) -> Any:
        backend: dict[str, Any] = {} if is_torchvision_available() else {"backend": "pil"}
        return MllamaProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **backend)

    def media_tokens(self, processor: Any) -> frozenset[int]:
        return frozenset({int(processor.image_token_id)})

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        return 1
