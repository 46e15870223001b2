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

import vlmbuild
from vlmbuild.engines import ask
from vlmbuild.engines.verify import verify_engine
from vlmbuild.golden.cases import GoldenCase
from vlmbuild.runtime.gguf.layout import MODEL

PYTHON = os.environ.get("LLAMA_CPP_PYTHON", "")
engine = pytest.mark.skipif(not PYTHON, reason="LLAMA_CPP_PYTHON names no interpreter with llama-cpp-python")

WHOLE = (112, 56)
"""A size of whole features, which llama.cpp leaves as it is."""


def test_image_tokens_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(Path(ask.__file__).parent / "workers")  # as Python has it that runs a worker
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
