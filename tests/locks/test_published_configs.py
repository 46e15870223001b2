"""Every published model at full depth, from its config.json alone: regions, matches, parameters, and committed locks."""

from __future__ import annotations

import pytest
from make_locks import LOCKS, recipes
from processors import CONFIGS

from vlmbuild.locks.check import check
from vlmbuild.planner.plan import plan
from vlmbuild.recipe import QuantSpec, Recipe

# Instances of repeated blocks, sites per pass, parameters of the published weights.
PUBLISHED = {
    "qwen2-vl-2b": ({"visual.blocks": 32, "language_model.layers": 28}, (63, 60, 7 * 28), 2_208_985_600),
    "qwen2-vl-7b": ({"visual.blocks": 32, "language_model.layers": 28}, (63, 60, 7 * 28), 8_291_375_616),
    "qwen2-vl-72b": ({"visual.blocks": 32, "language_model.layers": 80}, (115, 112, 7 * 80), 73_405_560_320),
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
}

NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name != "qwen2-vl-2b")) for name in PUBLISHED]


@pytest.mark.parametrize("name", NAMES)
def test_full_depth(name):
    blocks, matches, parameters = PUBLISHED[name]
    planned = plan(CONFIGS / name, Recipe(quantize=QuantSpec(), require=("fuse_rope", "swap_attention")))
    assert {region["name"]: region["instances"] for region in planned.regions if region["instances"] > 1} == blocks
    found = {report.name: report.matches for report in planned.passes}
    assert (found["fuse_rope"], found["swap_attention"], found["quantize_linear"]) == matches
    assert not [refusal for report in planned.passes for refusal in report.refusals if report.name != "quantize_linear"]
    assert planned.parameters == parameters


@pytest.mark.parametrize("name", NAMES)
def test_committed_locks_hold(name):
    """In this process, which has traced the model and compiles the kernels that models share once."""
    results = check(sorted(LOCKS.glob(f"{name}-*.lock")), processes=1)
    assert len(results) == len(recipes(name))
    assert not [(result.path.name, result.error, result.difference) for result in results if result.fails()]
