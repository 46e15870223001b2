"""Locks of checkpoints and artifacts are of one kind: an artifact differs in nothing from what would be built."""

from __future__ import annotations

from vlmbuild import diff, lock
from vlmbuild.cli.options import recipe_change
from vlmbuild.locks.make import lock_artifact
from vlmbuild.recipe import QuantSpec, Recipe


def test_an_artifact_is_what_its_checkpoint_compiles_to(checkpoint, nf4):
    found = diff(nf4.path, checkpoint, kernels=False)
    assert found.findings == ()
    made = lock_artifact(nf4.path, kernels=False)
    assert made.recipe == Recipe(quantize=QuantSpec(), dtype="float32")
    assert "f32" in made.regions["language_model.layers"].graph


def test_artifacts_of_two_recipes_differ_in_their_weights(nf4, plain):
    found = diff(nf4.path, plain.path, kernels=False)
    assert found.worst == "numerics"
    assert any("is stored as nf4" in finding.text for finding in found.findings)


def test_a_lock_and_a_checkpoint(checkpoint, tmp_path):
    path = tmp_path / "x.lock"
    path.write_text(lock(checkpoint, Recipe(dtype="float16"), kernels=False).to_text())
    assert diff(path, checkpoint, kernels=False).findings == ()
    found = diff(path, checkpoint, Recipe(dtype="float32"), kernels=False)
    assert "dtype: float16 → float32" in [finding.text for finding in found.findings]


def test_options_stand_over_the_other_sides_recipe(checkpoint, tmp_path):
    path = tmp_path / "x.lock"
    path.write_text(lock(checkpoint, Recipe(dtype="float16", attention="sdpa"), kernels=False).to_text())
    found = diff(path, checkpoint, recipe_change({"dtype": "bfloat16"}), kernels=False)
    recipe = [finding.text for finding in found.findings if finding.place == "recipe"]
    assert recipe == ["dtype: float16 → bfloat16"]


def test_a_quantized_source_is_locked_from_its_config(nf4):
    made = lock(nf4.path, kernels=False)
    assert made.regions["language_model.layers"].weights["mlp.up_proj.weight"].startswith("nf4")
