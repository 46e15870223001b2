"""A new target is what writes it and a row in each table: nothing else in vlmbuild knows targets by name."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from tiny import ATTENDED, BATCH

import vlmbuild
from vlmbuild import recipe
from vlmbuild.runtime import load
from vlmbuild.targets import TARGETS, Target
from vlmbuild.targets.records import publish
from vlmbuild.targets.trainable import write_checkpoint


def write(writer, request):
    """Write a trainable checkpoint with a note beside it."""
    write_checkpoint(writer, request)
    writer.write("note.txt", request.recipe.dtype.encode(), "data")
    return publish(writer, request, formats=[], numerics=request.measure(writer.staging))


def opened(reader, device, dtype):
    model = load.OPENERS["trainable"].open(reader, device, dtype)
    model.note = reader.read("note.txt").decode()
    return model


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(recipe.TARGET_OPTIONS, "toy", recipe.TargetOptions(dtypes=("float32",), formats=("int8",)))
    monkeypatch.setitem(TARGETS, "toy", Target(begin=lambda: nullcontext(write)))
    monkeypatch.setitem(load.OPENERS, "toy", load.Opener(opened))


@pytest.fixture
def artifact(toy, checkpoint, tmp_path):
    return vlmbuild.build(checkpoint, tmp_path / "toy", vlmbuild.Recipe(target="toy"))


def test_it_is_built_and_loaded(artifact, plain):
    assert artifact.manifest.target == "toy"
    assert artifact.manifest.name.split("-")[-2:] == ["toy", "float32"]
    model, _ = vlmbuild.load(artifact.path)
    assert model.note == "float32"
    expected, _ = vlmbuild.load(plain.path)
    with torch.no_grad():
        logits = [each(**BATCH).logits[ATTENDED] for each in (model, expected)]
    assert torch.equal(*logits)
    with pytest.raises(vlmbuild.VlmbuildError, match="built with, float32"):
        vlmbuild.load(artifact.path, dtype="bfloat16")


def test_commands_know_it(artifact, plain, run):
    code, out, _ = run("inspect", artifact.path, "--json")
    assert code == 0
    code, expected, _ = run("inspect", plain.path, "--json")
    assert code == 0
    assert json.loads(out)["roles"] == json.loads(expected)["roles"]
    code, _, err = run("verify", artifact.path, "--numerics")
    assert code == 2
    assert "toy" in err


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("option", [{"dtype": "float16"}, {"quantize": vlmbuild.QuantSpec()}, {"attention": "triton"}])
def test_its_recipes_are_checked(option):
    with pytest.raises(vlmbuild.VlmbuildError, match="--target toy"):
        vlmbuild.Recipe(target="toy", **option)


@pytest.mark.usefixtures("toy")
def test_plans_are_for_targets_that_train(checkpoint):
    with pytest.raises(vlmbuild.VlmbuildError, match="toy"):
        vlmbuild.plan(checkpoint, vlmbuild.Recipe(target="toy"))


def test_tables_have_the_same_targets():
    assert list(TARGETS) == list(load.OPENERS) == list(recipe.TARGET_OPTIONS)
