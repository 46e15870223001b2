"""Tiny trained checkpoints that ship with the package, by name."""

from pathlib import Path

ZOO: dict[str, Path] = {
    name: Path(__file__).with_name(name) for name in ("qwen2-vl-digits", "mllama-digits", "pixtral-digits")
}
"""Name -> checkpoint directory, in the published layout."""

DIGITS = Path(__file__).with_name("digits.npz")
"""Handwritten digits: arrays `images` and `labels`."""
