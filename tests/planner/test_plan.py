"""Plans: from config.json alone, and equal to what a build then does."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image
from processors import CONFIGS
from transformers import AutoImageProcessor

from vlmbuild import plan
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.families import FAMILIES
from vlmbuild.recipe import QuantSpec, Recipe

RECIPE = Recipe(quantize=QuantSpec(), dtype="float32")


@pytest.fixture
def config_only(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    return tmp_path


def test_config_is_enough_and_the_build_does_what_was_planned(config_only, nf4, reference):
    planned = plan(config_only, RECIPE)
    assert [report.record() for report in planned.passes] == [
        {key: entry[key] for key in ("name", "matches", "refusals")} for entry in nf4.manifest.passes
    ]
    assert planned.parameters == sum(p.numel() for p in reference.parameters())
    written = nf4.manifest.entry("model.safetensors").size
    assert 0.97 * written < planned.weight_bytes < written  # the file has a header
    roles = {role["role"]: role for role in planned.roles}
    assert roles["language"]["quantized"] > 0.99 * roles["language"]["parameters"] - 5000
    assert roles["vision"]["quantized"] == 0
    json.dumps(planned.to_json())


def test_images_cost_what_the_processor_makes_of_them(checkpoint, tmp_path):
    Image.new("RGB", (112, 56)).save(tmp_path / "wide.png")
    first, second = plan(checkpoint, RECIPE, images=[tmp_path / "wide.png", (56, 56)]).images
    assert (first.cost.patches, first.cost.tokens) == (32, 8)
    assert (second.cost.patches, second.cost.tokens) == (16, 4)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([(0, 5)], UsageError, "0 x 5"),
        (["no-such.png"], UsageError, "cannot be read as an image"),
        ([(1, 1000)], UsageError, "refuses the image|aspect"),
    ],
)
def test_bad_images(checkpoint, images, error, message):
    with pytest.raises(error, match=message):
        plan(checkpoint, images=images)


def test_images_need_a_processor(config_only):
    with pytest.raises(SourceError, match="no readable preprocessor_config.json"):
        plan(config_only, images=[(56, 56)])


@pytest.mark.parametrize(
    ("limits", "images", "message"),
    [
        ({"longest_edge": 500}, [], "change nothing without images"),
        ({"height": 500}, [(30, 40)], "no size.height to put a limit on; it has longest_edge, shortest_edge"),
        ({"longest_edge": 100, "shortest_edge": 9000}, [(30, 40)], "shortest_edge 9000 is above longest_edge 100"),
    ],
)
def test_bad_limits(limits, images, message):
    with pytest.raises(UsageError, match=message):
        plan("qwen2-vl-digits", images=images, limits=limits)


def test_limits_take_the_place_of_the_processors():
    held, free = (
        plan("qwen2-vl-digits", images=[(2000, 3000)], limits=limits).images[0].cost
        for limits in (None, {"longest_edge": 1_003_520})
    )
    assert held.patches * 14 * 14 <= 28 * 28 * 64
    assert 0.9 * 1_003_520 < free.patches * 14 * 14 <= 1_003_520
    assert free.tokens * 4 == free.patches


@pytest.mark.parametrize(
    ("name", "family", "cost"),
    [
        ("qwen2-vl-2b", "qwen2_vl", (4 * 37 * 25, 37 * 25, 0, 1)),
        ("qwen2.5-vl-7b", "qwen2_5_vl", (4 * 37 * 25, 37 * 25, 0, 10 * 7)),
        ("qwen3-vl-8b", "qwen3_vl", (4 * 32 * 22, 32 * 22, 0, 1)),
        ("llama-3.2-11b-vision", "mllama", (4 * 1608, 1, 4 * 1601, 1)),
        ("pixtral-12b", "pixtral", (64 * 44, 64 * 45, 0, 1)),
        ("gemma-3-4b", "gemma3", (4096, 260, 0, 1)),
        ("ministral-3-3b", "mistral3", (4 * 37 * 25, 37 * 26, 0, 1)),
    ],
)
def test_published_image_settings_are_enough_without_a_tokenizer(name, family, cost):
    config = FAMILIES[family].config(json.loads((CONFIGS / name / "config.json").read_text()))
    image_processor = AutoImageProcessor.from_pretrained(CONFIGS / name, backend="pil")
    assert FAMILIES[family].image_cost(image_processor, config, 1024, 700) == cost


def test_a_plan_is_for_training():
    with pytest.raises(UsageError, match="Leave --target out"):
        plan("qwen2-vl-digits", Recipe(target="aoti"))
