"""Golden cases: what is recorded, whatever the family, and what a build does with weights that differ."""

from __future__ import annotations

import engine_here
import pytest
import torch
from transformers.utils.import_utils import is_torchvision_available

import vlmbuild
from vlmbuild.engines import ENGINES
from vlmbuild.engines.ask import ask
from vlmbuild.engines.verify import verify_engine
from vlmbuild.errors import IncompatibleError, ParityError, UsageError
from vlmbuild.golden.cases import packaged_cases
from vlmbuild.golden.compare import compare
from vlmbuild.golden.files import golden_files, read_golden
from vlmbuild.golden.record import record_artifact
from vlmbuild.targets import golden

NEED_TORCHVISION = ("pixtral-digits", "smolvlm2-digits", "mistral3")
FAMILIES = [
    "mllama-digits",
    pytest.param("pixtral-digits", marks=pytest.mark.slow),
    pytest.param("smolvlm2-digits", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.release) for name in ("qwen2_5_vl", "mistral3", "gemma3")),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_what_transformers_computes(name, zoo_artifact, monkeypatch):
    if name in NEED_TORCHVISION and not is_torchvision_available():
        pytest.skip("transformers opens this family's processor with torchvision alone")
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)
    directory = zoo_artifact(name, dtype="float32").path
    records = record_artifact(directory, "trainable", packaged_cases()[1:])
    engine = ENGINES["transformers"]
    results = compare(records, ask(engine, directory, records).cases, engine.limits("float32"))
    assert [result for result in results if result.verdict == "differs"] == []
    kinds = {result.stage.partition(".")[0] for result in results}
    assert kinds == {"tokens", "pixels", "patches", "features", "embeddings", "hidden", "logits", "greedy"}


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_a_processor_that_lacks_torchvision_is_no_difference(zoo_artifact, monkeypatch):
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)
    built = zoo_artifact("smolvlm2-digits", dtype="float32")
    with pytest.raises(IncompatibleError, match="pip install .*torchvision"):
        verify_engine(built.path, built.manifest, "transformers", cases=packaged_cases()[:1])


def test_generated_tokens_are_those_of_the_model(zoo_artifact):
    """The reference run keeps a cache for each case."""
    directory = zoo_artifact("pixtral-digits", dtype="float32").path
    model, processor = vlmbuild.load(directory)
    for record in record_artifact(directory, "trainable"):
        batch = record.case.batch(processor)
        generated = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, len(record.tokens) :]
        assert record.greedy == generated.tolist()


def test_files_hold_everything(zoo_artifact):
    records = record_artifact(zoo_artifact("pixtral-digits", dtype="float32").path, "trainable")
    files = golden_files(records)
    again = read_golden(files.__getitem__)
    assert golden_files(again) == files
    assert [record.samples.keys() for record in again] == [record.samples.keys() for record in records]


@pytest.mark.parametrize(
    ("target", "form", "stage"), [("trainable", "none", "features"), ("compressed-tensors", "w8a8", "logits")]
)
def test_weights_that_differ_are_not_published(target, form, stage, tmp_path, monkeypatch):
    """The reader of the written weights gives others, as a writer that has permuted them would."""
    read = golden.WEIGHTS[target]

    class Permuted(read):
        def slots(self, region, instance, constants):
            return tuple(
                x.flip(0) if x.ndim == 2 and "layers" in instance else x
                for x in super().slots(region, instance, constants)
            )

    monkeypatch.setitem(golden.WEIGHTS, target, Permuted)
    recipe = vlmbuild.Recipe(target=target, quantize=vlmbuild.QuantSpec(form), dtype="float32")
    with pytest.raises(ParityError, match=f"stage {stage}"):
        vlmbuild.build("pixtral-digits", tmp_path / "out", recipe, golden=True)
    assert list(tmp_path.iterdir()) == []


def test_a_target_without_golden_cases_says_so(tmp_path):
    with pytest.raises(UsageError, match="--target trainable or --target onnx"):
        vlmbuild.build("pixtral-digits", tmp_path / "out", vlmbuild.Recipe(target="aoti"), golden=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_artifact_is_judged_by_its_own_weights(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)
    recipe = vlmbuild.Recipe(quantize=vlmbuild.QuantSpec(), dtype=dtype)
    built = vlmbuild.build("qwen2-vl-digits", tmp_path / "out", recipe, golden=True)
    records = read_golden(lambda path: (built.path / path).read_bytes())
    engine = ENGINES["transformers"]
    answers = ask(engine, built.path, records)
    assert answers.dtype == "bfloat16"  # bitsandbytes' kernel for CPUs rounds scales to it
    assert all(result.verdict != "differs" for result in compare(records, answers.cases, engine.limits(answers.dtype)))
    assert torch.is_grad_enabled()
