"""Every published model at full depth, from its config.json alone: committed locks hold, and their facts are the published ones."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from make_locks import CONFIGS, LOCKS, recipes

from vlmbuild.locks import kernel_table
from vlmbuild.locks.check import check
from vlmbuild.locks.document import read_lock, write_lock


def _qwen3(vision, text):
    return {"visual.blocks": vision, "visual.deepstack_merger_list": 3, "language_model.layers": text}


# Instances of repeated blocks, sites per pass, parameters of the published weights.
PUBLISHED = {
    "qwen2-vl-2b": ({"visual.blocks": 32, "language_model.layers": 28}, (63, 60, 7 * 28), 2_208_985_600),
    "qwen2-vl-7b": ({"visual.blocks": 32, "language_model.layers": 28}, (63, 60, 7 * 28), 8_291_375_616),
    "qwen2-vl-72b": ({"visual.blocks": 32, "language_model.layers": 80}, (115, 112, 7 * 80), 73_405_560_320),
    "qwen2.5-vl-3b": ({"visual.blocks": 32, "language_model.layers": 36}, (71, 68, 7 * 36), 3_754_622_976),
    "qwen2.5-vl-7b": ({"visual.blocks": 32, "language_model.layers": 28}, (63, 60, 7 * 28), 8_292_166_656),
    "qwen2.5-vl-72b": ({"visual.blocks": 32, "language_model.layers": 80}, (115, 112, 7 * 80), 73_410_777_344),
    "qwen3-vl-2b": (_qwen3(24, 28), (55, 52, 7 * 28), 2_127_532_032),
    "qwen3-vl-4b": (_qwen3(24, 36), (63, 60, 7 * 36), 4_437_815_808),
    "qwen3-vl-8b": (_qwen3(27, 36), (66, 63, 7 * 36), 8_767_123_696),
    "qwen3-vl-32b": (_qwen3(27, 64), (94, 91, 7 * 64), 33_357_390_064),
    "llama-3.2-11b-vision": (
        {
            "vision_model.transformer.layers": 32,
            "vision_model.global_transformer.layers": 8,
            "language_model.layers": 32,
            "language_model.layers.cross_attn": 8,
        },
        (34, 80, 7 * 40),
        10_670_220_835,
    ),
    "llama-3.2-90b-vision": (
        {
            "vision_model.transformer.layers": 32,
            "vision_model.global_transformer.layers": 8,
            "language_model.layers": 80,
            "language_model.layers.cross_attn": 20,
        },
        (82, 140, 7 * 100),
        88_593_355_323,
    ),
    "pixtral-12b": (
        {"vision_tower.transformer.layers": 24, "language_model.layers": 40},
        (67, 64, 7 * 40),
        12_682_739_712,
    ),
    "mistral-small-3.1-24b": (
        {"vision_tower.transformer.layers": 24, "language_model.layers": 40},
        (67, 64, 7 * 40),
        24_011_361_280,
    ),
    "ministral-3-8b": (
        {"vision_tower.transformer.layers": 24, "language_model.layers": 34},
        (61, 58, 7 * 34),
        8_918_026_240,
    ),
    "ministral-3-3b": (
        {"vision_tower.transformer.layers": 24, "language_model.layers": 26},
        (53, 50, 7 * 26),
        3_849_090_048,
    ),
    "ministral-3-14b": (
        {"vision_tower.transformer.layers": 24, "language_model.layers": 40},
        (67, 64, 7 * 40),
        13_945_031_680,
    ),
    "gemma-3-4b": (
        {"vision_tower.encoder.layers": 27, "language_model.layers": 29, "language_model.layers_2": 5},
        (38, 61, 7 * 34),
        4_300_079_472,
    ),
    "gemma-3-12b": (
        {"vision_tower.encoder.layers": 27, "language_model.layers": 40, "language_model.layers_2": 8},
        (52, 75, 7 * 48),
        12_187_325_040,
    ),
    "gemma-3-27b": (
        {"vision_tower.encoder.layers": 27, "language_model.layers": 52, "language_model.layers_2": 10},
        (66, 89, 7 * 62),
        27_432_406_640,
    ),
    "idefics3-8b": ({"vision_model.encoder.layers": 27, "text_model.layers": 32}, (34, 59, 7 * 32), 8_462_086_384),
    "smolvlm2-2.2b": ({"vision_model.encoder.layers": 27, "text_model.layers": 24}, (26, 51, 7 * 24), 2_246_784_880),
    "smolvlm2-256m": ({"vision_model.encoder.layers": 12, "text_model.layers": 30}, (32, 42, 7 * 30), 256_484_928),
    "smolvlm2-500m": ({"vision_model.encoder.layers": 12, "text_model.layers": 32}, (34, 44, 7 * 32), 507_482_304),
}
ONE_OF_EACH_FORM = {
    "qwen2-vl-2b",
    "qwen2.5-vl-3b",
    "qwen3-vl-2b",
    "llama-3.2-11b-vision",
    "pixtral-12b",
    "mistral-small-3.1-24b",
    "ministral-3-3b",
    "gemma-3-4b",
    "idefics3-8b",
    "smolvlm2-256m",
}
"""One model of each form; the others are the same graphs in other sizes, which `test_full_depth` holds against published facts."""
_SLOT = re.compile(r"^  (\S+): (\w+)\[([\d, ]*)\] (parameter|buffer)", re.MULTILINE)


def parameters(lock):
    """Parameters of a lock's listings. A name of a region that occurs once counts once; packed bytes hold two."""
    counts = {}
    for name, region in lock.regions.items():
        for slot, dtype, shape, kind in _SLOT.findall(region.graph):
            packed = dtype == "u8" and slot.endswith(".weight")
            if kind == "parameter" or packed:
                size = math.prod(int(side) for side in shape.split(", ") if side) * (2 if packed else 1)
                counts[(name, slot) if region.instances > 1 else slot] = size * region.instances
    return sum(counts.values())


def narrowed(file, folder):
    """Write a lock with the kernels of one target."""
    lock = read_lock(file)
    table = {
        label: replace(kernel, targets={"sm_90": kernel.targets["sm_90"]})
        for label, kernel in lock.kernels.table.items()
    }
    write_lock(folder / file.name, replace(lock, kernels=replace(lock.kernels, table=table)))
    return folder / file.name


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_depth(name):
    """The committed lock's facts; that it holds is the next test."""
    blocks, matches, published = PUBLISHED[name]
    lock = read_lock(LOCKS / f"{name}-nf4-triton.lock")
    assert {key: region.instances for key, region in lock.regions.items() if region.instances > 1} == blocks
    found = {key: entry.matches for key, entry in lock.passes.items()}
    assert (found["fuse_rope"], found["swap_attention"], found["quantize_linear"]) == matches
    refusing = {key for key, entry in lock.passes.items() if entry.refusals}
    assert refusing <= {"quantize_linear"}
    assert parameters(lock) == published


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow if name in ONE_OF_EACH_FORM else pytest.mark.release] * (name != "qwen2-vl-2b"),
        )
        for name in PUBLISHED
    ],
)
def test_committed_locks_hold(name, tmp_path, monkeypatch):
    """In this process, which traces the model once; kernels of the first model are compiled for all targets."""
    files = sorted(LOCKS.glob(f"{name}-*.lock"))
    if name != "qwen2-vl-2b":
        monkeypatch.setattr(kernel_table, "TARGETS", (90,))
        files = [narrowed(file, tmp_path) for file in files]
    results = check(files, processes=1)
    assert len(results) == len(recipes(name))
    assert not [(result.path.name, result.error, result.difference) for result in results if result.fails()]


def test_every_published_config_is_locked():
    names = {f"{folder.name}-{form}-{kind}" for folder in CONFIGS.iterdir() for form, kind in recipes(folder.name)}
    assert {path.stem for path in LOCKS.iterdir()} == names
