"""Tiny trained checkpoints that ship with the package, by name."""

from pathlib import Path

CHECKPOINTS = {
    "qwen2_vl": "qwen2-vl-digits",
    "mllama": "mllama-digits",
    "pixtral": "pixtral-digits",
    "qwen3_vl": "qwen3-vl-digits",
    "smolvlm": "smolvlm2-digits",
}
"""Model family -> name of its checkpoint."""

ZOO: dict[str, Path] = {name: Path(__file__).with_name(name) for name in CHECKPOINTS.values()}
"""Name -> checkpoint directory, in the published layout."""

DIGITS = Path(__file__).with_name("digits.npz")
"""Handwritten digits: arrays `images` and `labels`."""
