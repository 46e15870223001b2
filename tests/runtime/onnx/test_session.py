"""Malformed models are refused with a reason, before ONNX Runtime sees them."""

import os
import shutil
import sys

import onnx
import onnxruntime
import pytest
import torch
from hub_cache import cached
from republish import republish

import vlmbuild
from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.errors import DeviceError, IncompatibleError, IntegrityError
from vlmbuild.runtime.onnx.session import check_provider, open_session
from vlmbuild.zoo import ZOO

STEM = "embed_tokens"


@pytest.fixture
def copy(onnx_artifact, tmp_path):
    return shutil.copytree(onnx_artifact("qwen2-vl-digits").path, tmp_path / "artifact")


def edit(copy, change):
    """Change the model, with external data left where it is."""
    file = copy / "onnx" / f"{STEM}.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())


def relocate(place):
    def change(model):
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = place

    return change


def external(model):
    """Put the weight first."""
    model.graph.initializer.sort(key=lambda tensor: tensor.data_location != onnx.TensorProto.EXTERNAL)


def test_runs(copy):
    found = open_session(copy, STEM).run({"input_ids": torch.tensor([[1, 2]]), "unknown": torch.zeros(1)})
    assert found["inputs_embeds"].shape[:2] == (1, 2)


@pytest.mark.parametrize("place", ["../config.json", "/etc/hostname", "a/b", "..", "."])
def test_data_outside_of_the_folder(copy, place):
    edit(copy, external)
    edit(copy, relocate(place))
    with pytest.raises(IncompatibleError, match="outside of the folder"):
        open_session(copy, STEM)


def test_missing_data(copy):
    (copy / "onnx" / f"{STEM}.onnx_data").unlink()
    with pytest.raises(IncompatibleError, match="onnx_data' are missing"):
        open_session(copy, STEM)
    with pytest.raises(IntegrityError, match=f"missing.*{STEM}.onnx_data"):
        vlmbuild.load(copy)


def test_data_that_is_a_link(copy):
    data = copy / "onnx" / f"{STEM}.onnx_data"
    os.rename(data, copy / "elsewhere")
    data.symlink_to(copy / "elsewhere")
    with pytest.raises(IncompatibleError, match="missing"):
        open_session(copy, STEM)


def test_truncated_data(copy):
    with (copy / "onnx" / f"{STEM}.onnx_data").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(IncompatibleError, match="ends before the weight"):
        open_session(copy, STEM)


@pytest.mark.parametrize("content", [b"", b"\x00\xff no protobuf", b"{}"])
def test_no_model(copy, content):
    (copy / "onnx" / f"{STEM}.onnx").write_bytes(content)
    with pytest.raises(IncompatibleError):
        open_session(copy, STEM)


def test_operators_that_onnxruntime_has_not(copy):
    def change(model):
        model.graph.node[0].op_type = "Unheard"

    edit(copy, change)
    with pytest.raises(IncompatibleError, match="cannot open it"):
        open_session(copy, STEM)


def test_a_changed_model_is_never_opened(copy, monkeypatch):
    edit(copy, lambda model: model.graph.node[0].ClearField("name"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(IntegrityError, match=f"onnx/{STEM}.onnx"):
        vlmbuild.load(copy)


def test_a_provider_that_is_not_there(copy, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="cannot run on 'cuda'.*CPUExecutionProvider"):
        check_provider("cuda")
    assert check_provider("cpu") == "CPUExecutionProvider"


def test_one_that_belongs_to_another_model(copy, tmp_path):
    config = ZOO["pixtral-digits"] / "config.json"
    with pytest.raises(IncompatibleError, match="do not belong together"):
        vlmbuild.load(republish(copy, tmp_path / "other", {"config.json": config.read_bytes()}))


def test_without_onnx_runtime_only_its_target_is_refused(onnx_artifact, tmp_path, monkeypatch):
    artifact, stages = onnx_artifact("qwen2-vl-digits").path, []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(IncompatibleError, match="pip install onnxruntime`, or .*onnxruntime-gpu"):
        vlmbuild.build(
            "qwen2-vl-digits",
            tmp_path / "out",
            vlmbuild.Recipe(target="onnx"),
            progress=lambda stage, *_: stages.append(stage),
        )
    assert not any("capture" in stage for stage in stages)
    with pytest.raises(IncompatibleError, match="onnxruntime"):
        vlmbuild.load(artifact)
    assert vlmbuild.verify(artifact).target == "onnx"
    vlmbuild.plan("qwen2-vl-digits")


def test_models_are_opened_in_the_directory_that_was_verified(onnx_artifact, copy, tmp_path):
    """Whatever lies at its path by then; where files are links, its path is all there is."""
    reader = ArtifactReader(copy)
    folder = reader.folder("onnx")
    os.rename(copy, tmp_path / "aside")
    shutil.copytree(tmp_path / "aside", copy)
    (copy / "onnx" / f"{STEM}.onnx").write_bytes(b"other")
    inputs = {"input_ids": torch.tensor([[1, 2]])}
    if sys.platform == "linux":
        assert open_session(copy, STEM, folder=folder).run(inputs)["inputs_embeds"].shape[:2] == (1, 2)
    with pytest.raises(IncompatibleError, match=f"{copy}.*not a readable"):
        open_session(copy, STEM)
    snapshot = cached(tmp_path / "aside", tmp_path / "hub")
    assert ArtifactReader(snapshot).folder("onnx") == str(snapshot / "onnx")
    assert open_session(snapshot, STEM).run(inputs)["inputs_embeds"].shape[:2] == (1, 2)
