"""What users of other tools complain of most: each is impossible here, or refused with a message that says what to do."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from adapters import edit_adapter, write_adapter

import vlmbuild
from vlmbuild.errors import ParityError, SourceError
from vlmbuild.merge import Merge
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.source import PROCESSOR_FILES
from vlmbuild.zoo import ZOO


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An NF4 artifact, and an adapter that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    artifact = vlmbuild.build("qwen2-vl-digits", folder / "nf4", Recipe(quantize=QuantSpec(), dtype="float32")).path
    return artifact, write_adapter(artifact, folder / "adapter")


def test_complaint_07_merged_model_differs_from_adapter(trained, tmp_path, monkeypatch):
    """The manifest says by how much; where it is more than rounding, nothing is published."""
    artifact, adapter = trained
    merged = vlmbuild.build(artifact, tmp_path / "merged", Recipe(dtype="bfloat16"), adapter=adapter)
    (record,) = merged.manifest.numerics
    assert float(record["error"]) < 0.1 * float(record["effect"])
    for lost in (
        lambda _self, _name, values, _first: values.float(),
        lambda _self, _name, values, _first: values * 1.5,
    ):
        monkeypatch.setattr(Merge, "merged", lost)
        with pytest.raises(ParityError, match="Nothing was published"):
            vlmbuild.build(artifact, tmp_path / "out", Recipe(dtype="bfloat16"), adapter=adapter)
    assert os.listdir(tmp_path) == ["merged"]


def test_complaint_08_adapter_not_loaded_after_key_rename(trained, tmp_path):
    """Published names of older versions are the same layers; any other name is refused, for loading and for merging."""
    artifact, adapter = trained
    old = shutil.copytree(adapter, tmp_path / "old")
    edit_adapter(old, lambda t: {key.replace("model.language_model.", "model."): value for key, value in t.items()})
    one, two = vlmbuild.load(artifact)[0], vlmbuild.load(artifact)[0]
    vlmbuild.load_adapter(one, adapter)
    vlmbuild.load_adapter(two, old)
    for (name, expected), (other, found) in zip(one.trainable_parameters(), two.trainable_parameters(), strict=True):
        assert name == other
        assert torch.equal(expected, found), name
    edit_adapter(old, lambda t: {key.replace("layers.0.", "blocks.0."): value for key, value in t.items()})
    with pytest.raises(SourceError, match=r"language_model.blocks.0.* is not a linear layer of the model"):
        vlmbuild.load_adapter(vlmbuild.load(artifact)[0], old)
    with pytest.raises(SourceError, match=r"language_model.blocks.0.* is not a linear layer of the model"):
        vlmbuild.build(artifact, tmp_path / "out", adapter=old)


def test_complaint_13_processor_or_chat_template_lost_after_a_merge(trained, tmp_path):
    """They are the source's, byte for byte; a source without a processor is refused before any work."""
    artifact, adapter = trained
    merged = vlmbuild.build(artifact, tmp_path / "merged", adapter=adapter).path
    kept = [name for name in PROCESSOR_FILES if (ZOO["qwen2-vl-digits"] / name).exists()]
    assert {"tokenizer.json", "chat_template.jinja", "processor_config.json"} <= set(kept)
    for name in kept:
        assert (merged / name).read_bytes() == (ZOO["qwen2-vl-digits"] / name).read_bytes(), name
    assert vlmbuild.load(merged)[1].chat_template
    bare = shutil.copytree(ZOO["qwen2-vl-digits"], tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="has a tokenizer"):
        vlmbuild.build(bare, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()
