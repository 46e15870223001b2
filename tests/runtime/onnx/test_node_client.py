"""transformers.js itself, in Node: its processor and its generation on our artifacts, beside ours and transformers'.

It takes some 30 s, of which seven go into installing the client (470 MB); skipped where npm or its registry is out of reach.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import READ, prompt
from vlmbuild.runtime.onnx.weights import OnnxWeights
from vlmbuild.zoo import ZOO

pytestmark = pytest.mark.slow  # exports models and runs them in Node

CLIENT = "@huggingface/transformers@4.3.1"
SCRIPT = Path(__file__).parents[2] / "helpers" / "onnx_client.mjs"
GREEDY = {"max_new_tokens": 8, "do_sample": False}
UNITS = {"qwen2-vl-digits": 28, "pixtral-digits": 20}
"""Sides of images are multiples of it: the client resizes by other filters than Pillow, so images are passed that it leaves."""


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """(request) -> what the client answers."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node")
    quiet = ("--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1", "--fetch-timeout=20000")
    done = subprocess.run([npm, "install", *quiet, CLIENT], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot install {CLIENT}: {' '.join(done.stderr.split())[:300]}")
    shutil.copy(SCRIPT, folder)

    def ask(request):
        (folder / "request.json").write_text(json.dumps(request, default=str))
        answer = subprocess.run(
            ["node", SCRIPT.name, "request.json"], cwd=folder, capture_output=True, text=True, timeout=120
        )
        assert answer.returncode == 0, answer.stderr[-2000:]
        return json.loads(answer.stdout.splitlines()[-1])

    return ask


def canvases(zoo):
    """Three of different sizes and numbers of digits, in sizes that the client leaves."""
    unit = UNITS[zoo]
    images = [sample.image for sample in Digits("held_out", 5).take(3)]
    return [image.resize(tuple(max(2, round(side / unit)) * unit for side in image.size)) for image in images]


def reference(zoo, artifact):
    """transformers' model in float32, with the weights that the artifact's stand for."""
    model = AutoModelForImageTextToText.from_pretrained(ZOO[zoo], dtype=torch.float32).eval()
    weights, state = OnnxWeights(artifact), model.state_dict()
    for name in weights.packed:
        state[name].copy_(weights.tensor(name))
    return model


@pytest.mark.parametrize(
    ("zoo", "recipe"),
    [
        ("qwen2-vl-digits", {}),
        ("qwen2-vl-digits", {"quantize": vlmbuild.QuantSpec("int4")}),
        ("pixtral-digits", {"dtype": "float16"}),
        ("pixtral-digits", {"quantize": vlmbuild.QuantSpec("int4", symmetric=False)}),
    ],
    ids=["qwen2-vl, float32", "qwen2-vl, int4", "pixtral, float16", "pixtral, int4"],
)
def test_says_what_transformers_and_ours_say(node, onnx_artifact, tmp_path, zoo, recipe):
    directory = onnx_artifact(zoo, **recipe).path
    images = canvases(zoo)
    files = [tmp_path / f"{number}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    found = node(
        {"directory": directory, "question": READ.question, "images": files, "steps": GREEDY["max_new_tokens"]}
    )
    ours, processor = vlmbuild.load(directory)
    theirs, text = reference(zoo, directory), prompt(processor, READ)
    for image, answer in zip(images, found, strict=True):
        batch = processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")
        assert (answer["prompt"], answer["ids"]) == (text, batch["input_ids"][0].tolist())
        pixels = torch.tensor(answer["pixels"]).view_as(batch["pixel_values"])
        torch.testing.assert_close(pixels, batch["pixel_values"], rtol=0, atol=1e-5)
        for model in (ours, theirs):
            generated = model.generate(**batch, **GREEDY)[0, len(answer["ids"]) :].tolist()
            assert answer["tokens"] == generated, type(model).__name__
        assert len(answer["tokens"]) > 1
