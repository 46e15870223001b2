"""vLLM needs an interpreter of its own: without one, the line that installs it; with `VLLM_PYTHON`, its answers."""

from __future__ import annotations

import os

import pytest

from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.engines import ENGINES
from vlmbuild.engines.verify import verify_engine
from vlmbuild.errors import IncompatibleError
from vlmbuild.quant.spec import QuantSpec

FORMATS = ("none", "w4a16", "w8a8")
"""Formats with which vLLM 0.32 was seen to run on a CPU."""


@pytest.fixture(scope="module")
def artifact(zoo_artifact):
    return lambda form: zoo_artifact("qwen2-vl-digits", target="compressed-tensors", quantize=QuantSpec(form)).path


def verified(path, **options):
    return verify_engine(path, ArtifactReader(path).manifest, "vllm", **options)


def test_it_says_how_to_install_it(artifact):
    assert "compressed-tensors" in ENGINES["vllm"].targets
    with pytest.raises(IncompatibleError, match=r"pip install vllm.*--engine-python"):
        verified(artifact("w4a16"))


@pytest.mark.release
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no interpreter that has vLLM")
@pytest.mark.parametrize("form", FORMATS)
def test_it_answers_as_the_program(artifact, form):
    found = verified(artifact(form), python=os.environ["VLLM_PYTHON"])
    assert found["first"] is None
    assert {result["stage"] for result in found["results"]} == {"tokens", "logits", "greedy"}
