"""The families' tiny models and real processors: everything that tests of all families need to know of one.

To add a family: a module here with `FAMILY`, `processor()` (cached; real vocabulary and chat template, image settings of the published config in
`tests/configs/`) and `setup(full)` (a tiny config: two or three layers of each kind), and its line in `FAMILIES`. Everything else
follows: tests take `SETUPS` where families differ, and `KINDS` where they only must see every form that a program has; the other
families take those before a release (`pytest -m release -k NAME`). A family that shares another's vocabulary imports it from that
module. Its other tests together take at most 40 s of one core (`pytest --durations=20 -k NAME`): lower the layers, and the size of
images in `setup(False)`, until they do. What holds for it alone is `tests/families/test_<name>.py`.
A family of another distribution keeps such a module in its own repository, and `pytest --family-setup MODULE -k NAME` runs the tests on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from setups import gemma3, idefics3, mistral3, mllama, pixtral, qwen2_5_vl, qwen2_vl, qwen3_vl, smolvlm
from setups.base import Setup
from vlmbuild import use_plugins

FAMILIES: dict[str, Any] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "mllama": mllama,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
}

SETUPS: dict[str, Callable[[bool], Setup]] = {name: module.setup for name, module in FAMILIES.items()}
"""Family -> its setup; `full` has published image sizes."""

PROCESSORS: dict[str, Callable[[], Any]] = {name: module.processor for name, module in FAMILIES.items()}
"""Family -> its processor with published limits."""

KINDS = ["qwen2_vl", "mllama", "pixtral"]
"""Families whose programs have everything that the compiler and the runtime treat apart: packed segments and windows, positions on
three axes, tied and own heads, cross attention, state besides keys and values, images of padded tiles and of free sizes."""


def add(module: Any) -> None:
    """Add the family of an installed plugin to the tests; `module` is as those in this folder."""
    name = module.FAMILY.name
    use_plugins(name)
    FAMILIES[name], SETUPS[name], PROCESSORS[name] = module, module.setup, module.processor
    KINDS.append(name)


__all__ = ["FAMILIES", "KINDS", "PROCESSORS", "SETUPS", "Setup", "add"]
