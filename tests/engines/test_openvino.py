"""OpenVINO needs an interpreter of its own: with `OPENVINO_PYTHON`, its answers on ONNX models and on checkpoints."""

from __future__ import annotations

import os

import pytest
from checkpoints import copied, edit_config

from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.engines import ENGINES
from vlmbuild.engines.verify import verify_engine

needed = pytest.mark.skipif(
    "OPENVINO_PYTHON" not in os.environ, reason="OPENVINO_PYTHON names no interpreter that has OpenVINO"
)
SHOWN = {"tokens", "pixels", "features", "embeddings", "logits", "greedy"}


def verified(path, **options):
    return verify_engine(
        path, ArtifactReader(path).manifest, "openvino", python=os.environ["OPENVINO_PYTHON"], **options
    )


def test_it_opens_checkpoints_without_quantization(plain, nf4):
    engine = ENGINES["openvino"]
    assert engine.opens(plain.manifest)
    assert not engine.opens(nf4.manifest)


@needed
@pytest.mark.release
@pytest.mark.parametrize("target", ["onnx", "trainable"])
def test_it_answers_as_the_program(zoo_artifact, target):
    found = verified(zoo_artifact("qwen2-vl-digits", target=target, dtype="float32").path)
    assert found["first"] is None
    assert {result["stage"] for result in found["results"]} == SHOWN
    assert found["left_out"] == (["two images"] if target == "onnx" else [])


@needed
@pytest.mark.release
def test_a_fault_in_a_served_checkpoint_is_named(zoo_artifact, tmp_path):
    path = zoo_artifact("qwen2-vl-digits", target="trainable", dtype="float32").path
    served = copied(path, tmp_path / "served")
    edit_config(served, lambda values: values["text_config"].update(rms_norm_eps=0.1))
    assert verified(path, model=served)["first"]["stage"] == "logits"
