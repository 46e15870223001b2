"""Validation finds a model that computes something else, and a build publishes nothing then."""

import json
import shutil

import onnx
import pytest

from vlmbuild.builder.build import build
from vlmbuild.cli import main
from vlmbuild.errors import ParityError
from vlmbuild.measure import numerics
from vlmbuild.measure import onnx_parity as onnx_numerics
from vlmbuild.recipe import Recipe
from vlmbuild.targets.onnx import write


def change_first(file, kind, change):
    model = onnx.load(file, load_external_data=False)
    change(next(node for node in model.graph.node if node.op_type == kind))
    file.write_bytes(model.SerializeToString())


def larger_epsilon(node):
    node.attribute[[a.name for a in node.attribute].index("epsilon")].f = 1.0


def other_scale(node, factor=1.001):
    node.attribute[[a.name for a in node.attribute].index("scale")].f *= factor


def other_scale_within(loop):
    (body,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
    other_scale(next(node for node in body.node if node.op_type == "MultiHeadAttention"), 4)


@pytest.fixture
def copy(onnx_artifact, tmp_path):
    return shutil.copytree(onnx_artifact("qwen2-vl-digits").path, tmp_path / "artifact")


@pytest.mark.parametrize(
    ("file", "kind", "change", "output"),
    [
        ("decoder_model_merged", "RMSNormalization", larger_epsilon, "logits"),
        ("decoder_model_merged", "Attention", other_scale, "logits"),
        ("vision_encoder", "Loop", other_scale_within, "image_features"),
    ],
)
def test_a_model_that_differs_is_found(copy, file, kind, change, output):
    change_first(copy / "onnx" / f"{file}.onnx", kind, change)
    records = onnx_numerics.measure(copy, "float32")
    wrong = {record["output"] for record in records if float(record["error"]) > float(record["tolerance"])}
    assert output in wrong
    with pytest.raises(ParityError, match=r"differ from the program: case 'one image', output .* 1e-04 is allowed"):
        numerics.check_records(records, "The ONNX models")


def test_no_number_is_no_agreement():
    record = {"case": "c", "output": "logits", "error": "nan", "tolerance": "1e-04"}
    with pytest.raises(ParityError):
        numerics.check_records([record], "The ONNX models")


@pytest.mark.slow
def test_a_build_that_differs_publishes_nothing(tmp_path, monkeypatch, process_of_its_own):
    """The process measures another dtype than the artifact has, which no tolerance is for."""
    measured = write.onnx_measurement
    monkeypatch.setattr(write, "onnx_measurement", lambda directory, _: measured(directory, "bfloat16"))
    with process_of_its_own(), pytest.raises(ParityError, match="could not be run"):
        build("pixtral-digits", tmp_path / "out", Recipe(target="onnx"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_verify_runs_the_models_again(onnx_artifact, capsys, process_of_its_own):
    artifact = onnx_artifact("qwen2-vl-digits")
    with process_of_its_own():
        assert main(["verify", str(artifact.path), "--numerics", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["numerics"]
    assert [record["case"] for record in records] == [record["case"] for record in artifact.manifest.numerics]


def test_verify_names_what_is_for_onnx_alone(plain, capsys):
    assert main(["verify", str(plain.path), "--numerics"]) == 2
    assert "target trainable" in capsys.readouterr().err
