"""Differences that come from an engine's own pixels are told from faults."""

from __future__ import annotations

from dataclasses import replace

import engine_here
import numpy as np
import pytest
from checkpoints import copied, edit_config, edit_processor

from vlmbuild.engines import ENGINES
from vlmbuild.engines.ask import Answers, ask
from vlmbuild.engines.judge import judge
from vlmbuild.engines.verify import verify_engine
from vlmbuild.errors import SourceError
from vlmbuild.golden.cases import packaged_cases
from vlmbuild.golden.compare import Answer, first_difference
from vlmbuild.golden.record import record_artifact
from vlmbuild.golden.tolerances import COMPUTE


@pytest.fixture(scope="module")
def artifact(zoo_artifact):
    return zoo_artifact("qwen2-vl-digits", dtype="float32")


@pytest.fixture
def served(artifact, tmp_path, monkeypatch):
    """A folder whose processor makes slightly other pixels, as another library does."""
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)
    folder = copied(artifact.path, tmp_path / "served")
    edit_processor(folder, lambda values: values.update(image_mean=[mean + 2e-3 for mean in values["image_mean"]]))
    return folder


def verified(artifact, served):
    return verify_engine(artifact.path, artifact.manifest, "transformers", model=served, cases=packaged_cases())


def test_what_the_program_makes_of_the_same_pixels_is_compared(artifact, served):
    found = verified(artifact, served)
    results = {(result["case"], result["stage"]): result for result in found["results"]}
    assert found["first"] is None
    assert found["own_pixels"]
    for case in found["own_pixels"]:
        assert results[case, "pixels"]["verdict"] == "within"
        assert float(results[case, "features"]["error"]) < COMPUTE["float32"] / 10
    assert "text" not in found["own_pixels"]


def test_a_fault_is_still_named(artifact, served):
    edit_config(served, lambda values: values["text_config"].update(rms_norm_eps=0.1))
    assert verified(artifact, served)["first"]["stage"] == "hidden.0"


def test_where_pixels_are_equal_nothing_is_computed_again(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)
    monkeypatch.setattr("vlmbuild.engines.judge.record_artifact", None)
    folder = copied(artifact.path, tmp_path / "served")
    edit_config(folder, lambda values: values["text_config"].update(rms_norm_eps=0.1))
    found = verified(artifact, folder)
    assert (found["first"]["stage"], found["own_pixels"]) == ("hidden.0", [])


def test_an_engine_that_gives_up_is_not_asked_what_its_pixels_give(artifact, served, monkeypatch):
    monkeypatch.setattr("vlmbuild.engines.judge.record_artifact", None)
    records = record_artifact(artifact.path, "trainable", packaged_cases()[:1])
    (known,) = ask(ENGINES["transformers"], served, records).cases
    failed = Answer(known.tokens, {"pixels": known.values["pixels"]}, failed=("features", "out of memory"))
    results, own = judge(artifact.path, artifact.manifest, ENGINES["transformers"], records, Answers("1", [failed]))
    assert (first_difference(results).stage, own) == ("features", [])


def test_pixels_of_another_shape_are_refused(artifact):
    case = replace(packaged_cases()[0], pixels=np.zeros((3, 5), np.float32))
    with pytest.raises(SourceError, match=r"\[3, 5\]"):
        record_artifact(artifact.path, "trainable", [case])
