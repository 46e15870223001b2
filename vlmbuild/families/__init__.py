"""The supported model families, by name.

A new family is a folder here, one line in `FAMILIES`, one file in `tests/helpers/setups/` (a tiny config and a real
processor), which runs the tests that hold for every family, and `tests/families/test_<name>.py` for the rest. In order:

1. Choose the base class: `MropeFamily` (`mrope.py`: processors with `image_grid_thw`, positions on three axes), `GridFamily`
   (`grid.py`: images are grids of patches, features take the places of placeholder tokens), `PackedPatchFamily`
   (`packed_patches.py`: images padded to the largest one, with `image_sizes`), `TileFamily` (`tiles.py`: images cut into
   square tiles of one size, listed or padded to the sample with most) or `Family` (`base.py`). Override what differs;
   abstract methods are what a family must say. Set `language_prefix` where the language model is not at
   `model.language_model.`. A tower or a processor that another family has is imported from its folder (`PixtralTower`);
   families whose processors have one class tell them apart in `has_processor`.
2. `model.py`: transformers' classes, `check` (refuse configs that would be captured wrongly; name in `list_fields`
   the fields of config.json that hold a list where other families hold a number), the core module (`traced.py`;
   transformers' own layers, called with tensors only: nothing may depend on data), `geometry`, `rotary_modules`, names. A
   method of transformers that writes in place or selects by a mask gets an equal one on the module made for the trace
   (`Qwen3VL.module`). Features that single decoder layers add at image tokens (Qwen3-VL) are joined into one feature,
   several embeddings wide, which every target carries beside the embeddings. Architectures that users may take for a
   supported one are `refused_architectures`.
3. `prepare.py`, where the base class does not do it: everything that depends on data, on the host, packed (`batch.py`); a
   tower's windows are segments from `GridFamily.vision_tensors`, which also gives the order of features where the tower has
   one of its own. Give all bounds (`*_cu_seqlens`) of a tower the same length: blocks with windows and without then share
   one region. Patches that become one feature lie side by side (order them on the host, as `TileLayout.cut` does), so that
   merging them is a reshape. What follows from the config alone is no input but a buffer of the core module, with its value
   in `constants`. Name the sample in every refusal. Where transformers has the host function (`transformers.vision_utils`,
   `get_rope_index`), call it.
4. `processor.py`: loading without torchvision (without the video processor, as `ImageTextSmolVLMProcessor` in
   `idefics3/processor.py`; with frames in its place, as `FrameProcessor` in `qwen2_vl`), the cost of an image, tokens of
   media (`is_media` too, where a processor writes text into an image or video), files for transformers.js (`js.py`).

A new version of transformers touches `model.py` and `processor.py` of the families, `chat_processor.py` and `runtime/hf.py`:
modules of its models and its private names are used nowhere else here.

Nothing that builds, stores or runs a model knows a family's name; the zoo, the demo and examples in help texts do. If a pass
does not match, teach the pass a new pattern. An operator that is new in programs needs a line in `vlmbuild/ir/serialize.py`
and one in `targets/onnx/aten.py`.

Beside these: the folder in `packages` of `pyproject.toml`; config.json and the processor's settings in `tests/configs/`,
with their sizes in `tests/locks/test_published_configs.py` and locks from `tests/helpers/make_locks.py`; the row in
README.md. A family of another distribution (`.github/CONTRIBUTING.md`) needs none of these, and no line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbuild.errors import IncompatibleError, SourceError, UsageError
from vlmbuild.families.base import Family, InputLayout
from vlmbuild.families.batch import ImageCost, PackedBatch, check_ids
from vlmbuild.families.gemma3.model import Gemma3
from vlmbuild.families.idefics3.model import Idefics3, SmolVLM
from vlmbuild.families.js import ClientVision
from vlmbuild.families.mistral3.model import Mistral3
from vlmbuild.families.mllama.model import Mllama
from vlmbuild.families.pixtral.model import Pixtral
from vlmbuild.families.qwen2_5_vl.model import Qwen25VL
from vlmbuild.families.qwen2_vl.model import Qwen2VL
from vlmbuild.families.qwen3_vl.model import Qwen3VL
from vlmbuild.families.traced import KeyGroups, Segments

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (Mistral3(), Mllama(), Pixtral(), Qwen2VL(), Qwen25VL(), Qwen3VL(), Idefics3(), SmolVLM(), Gemma3())
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Find the family that reads a config.json.

    Raises:
        SourceError: There is none, or model_type is another family's.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(
            f"{where}: architectures must be a list of names, not {names!r}. Restore the published config.json."
        )
    for family in FAMILIES.values():
        if known := [name for name in names if name in family.architectures]:
            own, said = family.config_class.model_type, config.get("model_type")
            if said not in (own, None):
                raise SourceError(
                    f"{where}: model_type is {said!r}, and {known[0]} is of {own!r}. Restore the published config.json."
                )
            return family
    for family in FAMILIES.values():
        for name, reason in family.refused_architectures:
            if name in names:
                raise SourceError(f"{where}: {name}: {reason}.")
    supported = ", ".join(f"{name} ({family.title})" for family in FAMILIES.values() for name in family.architectures)
    unknown = ", ".join(names) or f"model_type {config.get('model_type')!r} without architectures"
    raise SourceError(
        f"{where}: unknown architecture {unknown}. Use a checkpoint of: {supported}; or name the plugin that reads it: "
        "vlmbuild.use_plugins(NAME), or --plugin NAME."
    )


def family_named(name: str) -> Family:
    """Find the family that a program names.

    Raises:
        IncompatibleError: This version of vlmbuild does not know it.
    """
    family = FAMILIES.get(str(name))
    if family is None:
        known = ", ".join(FAMILIES)
        raise IncompatibleError(
            f"Unknown model family {name!r}; this vlmbuild knows {known}. Install a newer vlmbuild, or name the plugin "
            "that has it: vlmbuild.use_plugins(NAME), or --plugin NAME."
        )
    return family


def family_of_processor(processor: Any) -> Family:
    """Find the family of a processor.

    Raises:
        UsageError: There is none; often it is a tokenizer alone.
    """
    for family in FAMILIES.values():
        if family.has_processor(processor):
            return family
    known = ", ".join(dict.fromkeys(name for family in FAMILIES.values() for name in family.processors))
    raise UsageError(
        f"A {type(processor).__name__} is no processor of a supported model ({known}). Pass the one that vlmbuild.load "
        "returns."
    )


__all__ = [
    "FAMILIES",
    "ClientVision",
    "Family",
    "ImageCost",
    "InputLayout",
    "KeyGroups",
    "PackedBatch",
    "Segments",
    "check_ids",
    "family_named",
    "family_of",
    "family_of_processor",
]
