"""Plans: from config.json alone, and equal to what a build then does."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from vlmbuild import plan
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.recipe import QuantSpec, Recipe

RECIPE = Recipe(quantize=QuantSpec(), dtype="float32")


@pytest.fixture
def config_only(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    return tmp_path


def test_config_is_enough_and_the_build_does_what_was_planned(config_only, nf4, reference):
    planned = plan(config_only, RECIPE)
    assert [report.record() for report in planned.passes] == [dict(entry) for entry in nf4.manifest.passes]
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
    with pytest.raises(SourceError, match="no processor files"):
        plan(config_only, images=[(56, 56)])
