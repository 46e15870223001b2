"""transformers: `AutoProcessor` and `AutoModelForImageTextToText` as its users call them; in float32 but for bitsandbytes."""

from __future__ import annotations

from vlmbuild.engines.ask import Engine

ENGINE = Engine(
    name="transformers",
    worker="transformers_worker.py",
    install="{python} -m pip install 'transformers>=5.20' torch torchvision accelerate bitsandbytes compressed-tensors "
    "num2words pillow",
    targets=("trainable", "compressed-tensors"),
)
