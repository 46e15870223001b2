"""llama.cpp on GGUF artifacts: what it shows is what the program computes, and planted faults are found where they are.

Needs an interpreter with llama-cpp-python, named by the environment variable LLAMA_CPP_PYTHON.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import vlmbuild
from vlmbuild.demo import run as demo
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import LARGEST
from vlmbuild.engines import ENGINES
from vlmbuild.engines.ask import ask
from vlmbuild.engines.judge import judge
from vlmbuild.engines.verify import verify_engine
from vlmbuild.golden.cases import GoldenCase
from vlmbuild.golden.record import record_artifact
from vlmbuild.runtime.gguf.layout import MODEL

PYTHON = os.environ.get("LLAMA_CPP_PYTHON", "")
engine = pytest.mark.skipif(not PYTHON, reason="LLAMA_CPP_PYTHON names no interpreter with llama-cpp-python")

WHOLE = (112, 56)
"""A size of whole features, which llama.cpp leaves as it is."""


def test_image_tokens_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(
        Path(vlmbuild.__file__).parent / "engines/workers"
    )  # as Python has it that runs a worker
    image_tokens = importlib.import_module("llama_cpp_worker").image_tokens
    assert image_tokens([1, 9, 9, 2], 1, 2, [9, 8]) == [9, 9]
    assert image_tokens([1, 9, 8, 2], 1, 2, [9, 8]) == [9, 8]
    assert image_tokens([1, 9, 9, 2], 1, 3, [9, 8]) == [9, 9, 9]


def case(width, height):
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "Read the digits."}]
    return GoldenCase(f"{width} x {height}", ({"role": "user", "content": content},), (Image.fromarray(picture),))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    recipe = vlmbuild.Recipe(target="gguf", dtype="float32")
    return vlmbuild.build("qwen2-vl-digits", tmp_path_factory.mktemp("gguf") / "artifact", recipe)


def first_difference(artifact, *cases, model=None):
    found = verify_engine(artifact.path, artifact.manifest, "llama.cpp", python=PYTHON, model=model, cases=cases)
    assert {"tokens", "features", "logits", "greedy"} <= {each["stage"] for each in found["results"]}
    return found["first"] and found["first"]["stage"]


@engine
def test_images_of_whole_patches_are_equal(artifact):
    assert first_difference(artifact, case(*WHOLE)) is None


@engine
def test_other_images_differ_from_the_tower_on(artifact):
    assert first_difference(artifact, case(100, 60)) == "features"


@engine
def test_swapped_heads_are_found(artifact, tmp_path):
    folder = tmp_path / "faulty"
    shutil.copytree(artifact.path, folder)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / MODEL, "r+").tensors}
    query = tensors["blk.0.attn_q.weight"].data
    query[:] = np.concatenate([query[::2], query[1::2]])
    query.base.flush() if hasattr(query.base, "flush") else None
    assert first_difference(artifact, case(*WHOLE), model=folder) == "logits"


@engine
def test_swapped_colors_are_found(artifact, tmp_path):
    folder = tmp_path / "faulty"
    shutil.copytree(artifact.path, folder)
    reader = gguf.GGUFReader(folder / "mmproj.gguf", "r+")
    for key, value in (("mean", 0.3), ("std", 1.0)):
        field = reader.fields[f"clip.vision.image_{key}"]
        for index in field.data:
            field.parts[index][0] = value
    reader.data.flush()
    assert first_difference(artifact, case(*WHOLE), model=folder) == "features"


@engine
def test_limits_of_images_are_the_artifacts(artifact):
    settings = json.loads((artifact.path / "llama.cpp.json").read_text())
    assert settings["image_tokens"] == [4, 64]
    assert (
        first_difference(artifact, case(28, 28)) is None
    )  # is enlarged by the same filter, and rounded to levels elsewhere


@engine
@pytest.mark.release
def test_the_demos_fine_tune_answers_as_the_adapter_did(tmp_path):
    """Trained in NF4, merged, rounded to 8 bits: in llama.cpp as many held-out canvases are right."""
    result = demo.run(tmp_path / "demo", echo=lambda line: None)
    recipe = vlmbuild.Recipe(target="gguf", quantize=vlmbuild.QuantSpec("q8_0"), dtype="float16")
    built = vlmbuild.build(result.artifact, tmp_path / "gguf", recipe, adapter=result.adapter)
    samples = Digits("held_out", 5).take(200)
    processor = vlmbuild.load(result.artifact)[1]
    images = [as_the_processor_resizes(sample.image, processor.image_processor) for sample in samples]
    content = [{"type": "image"}, {"type": "text", "text": LARGEST.question}]
    cases = [
        GoldenCase(str(number), ({"role": "user", "content": content},), (image,))
        for number, image in enumerate(images)
    ]
    records = record_artifact(built.path, "gguf", cases)
    answers = ask(ENGINES["llama.cpp"], built.path, records, python=PYTHON)
    said = [processor.tokenizer.decode(answer.greedy, skip_special_tokens=True).strip() for answer in answers.cases]
    right = sum(text == LARGEST.answer(sample.digits) for text, sample in zip(said, samples, strict=True))
    print(f"adapter {result.after:.1%}, llama.cpp {right / len(samples):.1%}")
    assert right / len(samples) >= 0.97
    results, _ = judge(built.path, built.manifest, ENGINES["llama.cpp"], records, answers)
    assert [result for result in results if result.verdict == "differs"] == []
    # llama.cpp rounds inputs to 8 bits: of 200 answers one was another on a CPU without AVX-512, and none on one with it.
    same = sum(list(answer.greedy) == record.greedy for answer, record in zip(answers.cases, records, strict=True))
    assert same >= 0.99 * len(records)


def as_the_processor_resizes(image, settings):
    """Resize to whole patches, as it does and llama.cpp does not."""
    limits = {"min_pixels": settings.size["shortest_edge"], "max_pixels": settings.size["longest_edge"]}
    height, width = smart_resize(image.height, image.width, 28, **limits)
    return image.resize((width, height), Image.Resampling.BICUBIC)
