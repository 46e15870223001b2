"""Clients that know nothing of ours on our artifacts, beside ours and transformers': one that does what transformers.js does,
names, shapes, files and the loop of generation; and transformers.js itself, in Node and in a headless browser.
"""

import functools
import json

import clients
import matrix
import numpy as np
import onnxruntime
import pytest
import torch
from parity import MODEL_FP32, assert_close
from PIL import Image
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import READ, prompt
from vlmbuild.families import FAMILIES
from vlmbuild.measure.batches import cases
from vlmbuild.runtime.onnx.weights import OnnxWeights

pytestmark = pytest.mark.slow  # exports models and runs them in Node

RECIPES = {
    "qwen2-vl-digits": {"quantize": vlmbuild.QuantSpec("int4")},
    "pixtral-digits": {"dtype": "float16"},
    "qwen2_5_vl": {"dtype": "float32"},
}
CLASSES = (("Qwen2VL", "Qwen2VL"), ("Pixtral", "Pixtral"), ("Qwen2_5_VL", "Qwen2VL"))
"""Classes of the client that read a processor and its images, by checkpoint."""
STEPS = 5
GREEDY = {"max_new_tokens": 8, "do_sample": False}
UNITS = {"qwen2-vl-digits": 28, "pixtral-digits": 20, "qwen2_5_vl": 28}
"""Sides of images are multiples of it: the client resizes by other filters than Pillow, so images are passed that it leaves."""


@pytest.fixture(scope="session")
def scripts(tmp_path_factory):
    """Install transformers.js once; a folder."""
    folder = tmp_path_factory.mktemp("node")
    try:
        clients.install(folder)
    except clients.UnavailableError as reason:
        pytest.skip(str(reason))
    return folder


def canvases(zoo):
    """Three of different sizes and numbers of digits, in sizes that the client leaves."""
    unit = UNITS[zoo]
    images = [sample.image for sample in Digits("held_out", 5).take(3)]
    return [image.resize(tuple(max(2, round(side / unit)) * unit for side in image.size)) for image in images]


def reference(checkpoint, artifact):
    """Make transformers' model in float32, with the weights that the artifact's stand for."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    weights, state = OnnxWeights(artifact), model.state_dict()
    for name in weights.packed:
        state[name].copy_(weights.tensor(name))
    return model


ASKS = pytest.mark.parametrize("ask", [clients.ask_node, clients.ask_browser], ids=["Node", "browser"])


def check_answers(ask, scripts, directory, theirs, images, folder, *, resizes=False):
    """Compare the client's answers about images with ours and with those of transformers' model; on the client's own pixels
    where it `resizes`."""
    files = [folder / f"{number}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    try:
        found = ask(scripts, directory, images=files, question=READ.question, steps=GREEDY["max_new_tokens"])
    except clients.UnavailableError as reason:
        pytest.skip(str(reason))
    ours, processor = vlmbuild.load(directory)
    text = prompt(processor, READ)
    for image, answer in zip(images, found, strict=True):
        batch = processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")
        assert (answer["prompt"], answer["ids"]) == (text, batch["input_ids"][0].tolist())
        pixels = torch.tensor(answer["pixels"]).view_as(batch["pixel_values"])
        if resizes:
            assert (pixels - batch["pixel_values"]).abs().mean() < 0.1
            batch["pixel_values"] = pixels
        else:
            torch.testing.assert_close(pixels, batch["pixel_values"], rtol=0, atol=1e-5)
        for model in (ours, theirs):
            generated = model.generate(**batch, **GREEDY)[0, len(answer["ids"]) :].tolist()
            assert answer["tokens"] == generated, type(model).__name__
        assert len(answer["tokens"]) > 1


@ASKS
@pytest.mark.parametrize("zoo", RECIPES)
def test_says_what_transformers_and_ours_say(scripts, onnx_artifact, checkpoint_of, tmp_path, zoo, ask):
    directory = onnx_artifact(zoo, **RECIPES[zoo]).path
    check_answers(ask, scripts, directory, reference(checkpoint_of(zoo), directory), canvases(zoo), tmp_path)


ROLES = ("language", "vision", "projector", "embedding", "head")
QUANTIZED = {"none": vlmbuild.QuantSpec("none"), "int4": vlmbuild.QuantSpec("int4", exact_inputs=True, roles=ROLES)}
"""Rounded inputs would decide among the nearly equal logits of random weights, and a browser's kernels round otherwise."""


@pytest.fixture(scope="module")
def exported(checkpoint_of, onnx_artifact):
    """(family, format) -> its small model with random weights, and the model's artifact."""

    @functools.cache
    def exported(name, form="none"):
        directory = onnx_artifact(name, quantize=QUANTIZED[form]).path
        return matrix.positioned(reference(checkpoint_of(name), directory)), directory

    return exported


SIZES = {
    "qwen2_5_vl": ((84, 56), (28, 140), (112, 168)),
    "mistral3": ((84, 56), (28, 140), (196, 168)),
    "qwen3_vl": ((96, 64), (32, 160), (224, 192)),
    "idefics3": ((80, 80), (80, 40), (30, 80)),
    "smolvlm": ((80, 80), (80, 40), (30, 80)),
    "gemma3": ((48, 48), (96, 72), (40, 80)),
}
"""Families beyond the zoo: windows, merged patches and scaled queries, features wider than embeddings, tiles, blocks."""
RESIZED = ("idefics3", "smolvlm", "gemma3")
FORMS = {
    ("smolvlm", "none"): (),
    ("qwen3_vl", "none"): (),
    ("mistral3", "none"): (),
    ("gemma3", "none"): (),
    ("gemma3", "int4"): (),
    **{(name, "int4"): pytest.mark.release for name in ("qwen2_5_vl", "mistral3", "qwen3_vl", "idefics3", "smolvlm")},
}
"""Family and format -> marks: Qwen2-VL has another run in int4."""


@ASKS
@pytest.mark.parametrize(("name", "form"), [pytest.param(*key, marks=marks) for key, marks in FORMS.items()])
def test_families_without_a_zoo_checkpoint(scripts, exported, tmp_path, name, form, ask):
    model, directory = exported(name, form)
    photo = Image.fromarray(
        np.asarray(matrix.photographs()["rocket"])
    )  # without a colour profile, which the client applies
    images = [photo.resize(size) for size in SIZES[name]]
    check_answers(ask, scripts, directory, model, images, tmp_path, resizes=name in RESIZED)


@pytest.mark.parametrize("name", ["mistral3", "qwen3_vl", "smolvlm", "gemma3"])
def test_logits_and_tokens_are_those_of_transformers(exported, name):
    setup, (theirs, directory) = matrix.SETUPS[name](full=False), exported(name)
    model, processor = vlmbuild.load(directory)
    if name == "qwen3_vl":  # embeddings, and what two later layers add to them
        (embeddings,) = (entry for entry in model.models.decoder.inputs if entry.name == "inputs_embeds")
        assert embeddings.shape[-1] == 3 * 128
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for case in ("several sizes", "counts differ, left", "text only"):
        said, _ = matrix.conversations(setup)[case]
        inputs, _ = matrix.batch(matrix.replace(setup, processor=processor), said, "left")
        attended = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected = theirs(**inputs).logits[attended]
            assert_close(model(**inputs).logits[attended], expected, MODEL_FP32, case)
        assert model.generate(**inputs, **greedy).equal(theirs.generate(**inputs, **greedy)), case


class Client:
    """Reads config.json and the sessions' metadata."""

    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        dtype = json.loads((directory / "config.json").read_text())["transformers.js_config"]["dtype"]
        suffix = {"fp32": "", "q4": "_q4"}[dtype]
        self.vision, self.embed, self.decoder = (
            onnxruntime.InferenceSession(directory / f"onnx/{stem}.onnx", options, providers=["CPUExecutionProvider"])
            for stem in (f"vision_encoder{suffix}", f"embed_tokens{suffix}", f"decoder_model_merged{suffix}")
        )

        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.dtype = kinds[next(entry.type for entry in self.decoder.get_inputs() if entry.name == "inputs_embeds")]

    def run(self, session, values):
        """Run a session: undeclared inputs are dropped, declared ones must be there."""
        declared = [entry.name for entry in session.get_inputs()]
        assert set(declared) <= set(values), f"Missing the following inputs: {set(declared) - set(values)}"
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {name: values[name] for name in declared}), strict=True))

    def empty_cache(self, batch):
        """By the dimensions' names: batch_size is the batch, a number is itself, every other symbol is 0."""
        layers = self.config.get("num_hidden_layers") or self.config["text_config"]["num_hidden_layers"]
        wanted = [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        shapes = {entry.name: entry.shape for entry in self.decoder.get_inputs()}
        return {
            name: np.zeros(
                [size if isinstance(size, int) else batch if size == "batch_size" else 0 for size in shapes[name]],
                self.dtype,
            )
            for name in wanted
        }

    def generate(self, ids, mask, images, positions):
        """Greedy; `images` are the vision encoder's inputs, `positions(length, past)` those of the tokens."""
        embeds = self.run(self.embed, {"input_ids": ids})["inputs_embeds"]
        features = self.run(self.vision, images)["image_features"].reshape(-1, embeds.shape[-1])
        token = self.config.get("image_token_id", self.config.get("image_token_index"))
        places = np.argwhere(ids == token)
        assert len(places) == len(features)
        embeds[places[:, 0], places[:, 1]] = features
        cache, found, past = self.empty_cache(len(ids)), [], 0
        for _ in range(STEPS):
            values = {
                "inputs_embeds": embeds,
                "attention_mask": mask,
                "position_ids": positions(embeds.shape[1], past),
                "num_logits_to_keep": np.array(1, np.int64),
                **cache,
            }
            results = self.run(self.decoder, values)
            assert results["logits"].shape[1] == 1
            past += embeds.shape[1]
            cache = {name.replace("present", "past_key_values"): x for name, x in results.items() if name != "logits"}
            assert all(x.shape[2] == past for x in cache.values())
            chosen = results["logits"][:, -1].argmax(-1)[:, None]
            found.append(chosen)
            mask = np.concatenate([mask, np.ones_like(chosen)], 1)
            embeds = self.run(self.embed, {"input_ids": chosen})["inputs_embeds"]
        return np.concatenate(found, 1)


@pytest.mark.parametrize("zoo", RECIPES)
def test_generates_what_transformers_does(zoo, onnx_artifact, checkpoint_of):
    directory = onnx_artifact(zoo, **RECIPES[zoo]).path
    client = Client(directory)
    family = FAMILIES[client.config["model_type"].replace("llava", "pixtral")]
    config = family.config(client.config)
    batch = next(iter(cases(family.processor(directory)))).batch
    theirs = reference(checkpoint_of(zoo), directory)
    expected = theirs.generate(**batch, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)
    host = family.prepare(batch, config).tensors["position_ids"].numpy()
    following = int(host.max()) + 1

    def positions(length, past):
        if past:
            steps = following + np.arange(past - host.shape[-1], past - host.shape[-1] + length)
            return np.broadcast_to(steps, (*host.shape[:-1], length)).astype(np.int64)
        return host

    images = {name: tensor.numpy() for name, tensor in family.client_batch(batch).items()}
    found = client.generate(batch["input_ids"].numpy(), batch["attention_mask"].numpy(), images, positions)
    assert found.tolist() == expected[:, batch["input_ids"].shape[1] :].tolist()


def test_settings_that_the_client_needs(onnx_artifact):
    """By name, as its classes read them; it has other defaults for names that published files leave out."""
    directories = [onnx_artifact(zoo, **recipe).path for zoo, recipe in RECIPES.items()]
    for directory, (kind, images_kind) in zip(directories, CLASSES, strict=True):
        images = json.loads((directory / "preprocessor_config.json").read_text())
        assert images["processor_class"] == f"{kind}Processor"
        assert images["image_processor_type"] == f"{images_kind}ImageProcessor"
        assert (images["do_resize"], images["do_normalize"], images["resample"]) == (True, True, 3)
        assert isinstance(images["patch_size"], int)
        assert {"image_mean", "image_std", "size"} <= set(images)
        assert "chat_template" in json.loads((directory / "tokenizer_config.json").read_text())
    values = json.loads((directories[0] / "config.json").read_text())
    assert {"num_hidden_layers", "num_key_value_heads", "num_attention_heads", "hidden_size"} <= set(values)
    assert {"image_token_id", "video_token_id", "vision_start_token_id", "vision_config"} <= set(values)
    assert values["model_type"] == "qwen2_vl"
    assert values["transformers.js_config"]["dtype"] == "q4"  # the suffix of its files, in a browser too
    processor = json.loads((directories[1] / "processor_config.json").read_text())
    assert {"image_token", "image_break_token", "image_end_token", "patch_size", "spatial_merge_size"} <= set(processor)
