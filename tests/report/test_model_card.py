"""The model card: how each engine loads the files of a target. The rest of a card is tested with `vlmbuild push`."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.report.contents import contents
from vlmbuild.report.model_card import model_card

ARTIFACT = Path(__file__).parents[2] / "artifacts/prebuilt/qwen2-vl-digits-nf4"
ENGINES = {"transformers": "AutoModelForImageTextToText", "vLLM": "vllm serve"}


@pytest.mark.parametrize(
    ("target", "library", "engines"),
    [
        ("trainable", "transformers", ["transformers"]),  # in NF4, which vLLM does not read
        ("compressed-tensors", "transformers", ["transformers", "vLLM"]),
        ("onnx", "onnx", []),
        ("of-a-plugin", "vlmbuild", []),
    ],
)
def test_engines_of_a_target(target, library, engines):
    document = {**contents(ARTIFACT), "target": target}
    card = model_card(ArtifactReader(ARTIFACT), document, ("owner/name", "main"))
    assert f"library_name: {library}\n" in card and 'vlmbuild.load("owner/name"' in card
    assert [engine for engine in ENGINES if f"### {engine}\n" in card] == engines
    assert all(ENGINES[engine] in card for engine in engines)
    assert ("@huggingface/transformers" in card) == (target == "onnx")


def test_gguf_files_are_opened_by_llama_cpp_with_the_limits_of_images(zoo_artifact):
    path = zoo_artifact("qwen2-vl-digits", target="gguf", dtype="float16").path
    card = model_card(ArtifactReader(path), contents(path), ("owner/name", "main"))
    assert "library_name: gguf\n" in card and "vlmbuild.load(" not in card
    assert "llama-server -hf owner/name --jinja --image-min-tokens 4 --image-max-tokens 64\n" in card


def test_engines_of_a_branch():
    card = model_card(ArtifactReader(ARTIFACT), contents(ARTIFACT), ("owner/name", "nf4"))
    assert card.count('"owner/name", revision="nf4"') == 3 and "vlmbuild verify owner/name@nf4" in card


def test_what_the_build_measured():
    record = {"case": "logits", "error": "1e-6", "tolerance": "1e-5", "output": "a|b"}
    card = model_card(ArtifactReader(ARTIFACT), {**contents(ARTIFACT), "numerics": [record]}, ("owner/name", "main"))
    assert r"| logits | a\|b | 1e-6 | 1e-5 |" in card
