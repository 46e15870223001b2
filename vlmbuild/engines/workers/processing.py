"""Open a processor as transformers' users do, and make a prompt of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def open_processor(directory: str) -> Any:
    """Open a model's processor; where torchvision is missing, which videos need, the part of it for images and text."""
    import transformers

    try:
        return transformers.AutoProcessor.from_pretrained(directory)
    except (ImportError, ValueError) as error:
        settings = Path(directory, "processor_config.json")
        if "torchvision" not in str(error).lower() or not settings.is_file():
            raise
        kind = getattr(transformers, json.loads(settings.read_text(encoding="utf-8"))["processor_class"])
        try:
            return _without_videos(kind).from_pretrained(directory)
        except TypeError:  # its constructor does not do without
            raise ImportError(f"torchvision is missing, which {kind.__name__} needs for videos") from error


def prompt(processor: Any, case: Mapping[str, Any]) -> Any:
    """Make the inputs of a case's prompt, through the processor's chat template if the model has one."""
    if case["template"]:
        return processor.apply_chat_template(
            case["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    from PIL import Image

    images = {"images": [[Image.open(file).convert("RGB") for file in case["images"]]]} if case["images"] else {}
    return processor(text=[case["text"]], **images, add_special_tokens=False, return_tensors="pt")


def _without_videos(kind: Any) -> Any:
    """Derive a processor class without its video processor: its parts are the arguments of its constructor."""

    class ImagesAndText(kind):  # type: ignore[misc]  # a class that is known when it runs
        video_processor = None

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    return ImagesAndText
