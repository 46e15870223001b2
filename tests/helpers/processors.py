"""Parts of real processors, offline: vocabularies, image settings and photographs that PyPI packages ship.

`dashscope` has Qwen's vocabulary, `llama-models` Llama 3's, `mistral-common` Mistral's, `scikit-image` photographs. Only their files are
read; none of the packages is imported. Image settings are the published ones in `configs/`.
"""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor

CONFIGS = Path(__file__).parents[1] / "configs"


def shipped(distribution: str, name: str) -> Path:
    """Find a file of an installed distribution without importing it."""
    files = metadata.files(distribution) or []
    return next(Path(str(file.locate())) for file in files if file.as_posix().endswith(name))


@functools.cache
def photographs() -> dict[str, Image.Image]:
    """Read photographs by name; width x height: astronaut and camera (grey, made RGB) 512x512, chelsea 451x300, coffee 600x400,
    hubble_deep_field 1000x872, retina 1411x1411, rocket 640x427; wide 1000x100 and tall 50x872 are crops."""
    files = (
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
        "rocket.jpg",
    )
    paths = [shipped("scikit-image", f"skimage/data/{file}") for file in files]
    whole = {path.stem: Image.open(path).convert("RGB") for path in paths}
    sky = whole["hubble_deep_field"]
    return whole | {"wide": sky.crop((0, 400, 1000, 500)), "tall": sky.crop((450, 0, 500, 872))}


def with_special(tokenizer: Tokenizer, special: list[str]) -> Tokenizer:
    """Add special tokens behind the vocabulary, in order."""
    tokenizer.add_special_tokens(special)
    return tokenizer


def image_processor(config: str) -> Any:
    """Make the image processor of a published config."""
    return AutoImageProcessor.from_pretrained(CONFIGS / config, backend="pil", local_files_only=True)
