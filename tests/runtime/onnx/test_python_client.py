"""A client that does what transformers.js does, and knows nothing of ours: names, shapes, files and the loop of generation."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmbuild.families import FAMILIES
from vlmbuild.measure.batches import cases
from vlmbuild.zoo import ZOO

STEPS = 5


class Client:
    """Reads config.json and the sessions' metadata."""

    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.vision, self.embed, self.decoder = (
            onnxruntime.InferenceSession(directory / f"onnx/{stem}.onnx", options, providers=["CPUExecutionProvider"])
            for stem in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )

    def run(self, session, values):
        """What a session does not declare is dropped; what it declares must be there."""
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
                np.float32,
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


@pytest.mark.parametrize("zoo", ["qwen2-vl-digits", "pixtral-digits"])
def test_generates_what_transformers_does(zoo, onnx_artifact):
    directory = onnx_artifact(zoo).path
    client = Client(directory)
    family = FAMILIES[client.config["model_type"].replace("llava", "pixtral")]
    config = family.config(client.config)
    batch = next(iter(cases(family.processor(directory)))).batch
    theirs = AutoModelForImageTextToText.from_pretrained(ZOO[zoo], dtype=torch.float32).eval()
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
    for zoo, kind in (("qwen2-vl-digits", "Qwen2VL"), ("pixtral-digits", "Pixtral")):
        directory = onnx_artifact(zoo).path
        images = json.loads((directory / "preprocessor_config.json").read_text())
        assert images["processor_class"] == f"{kind}Processor"
        assert images["image_processor_type"] == f"{kind}ImageProcessor"
        assert (images["do_resize"], images["do_normalize"], images["resample"]) == (True, True, 3)
        assert isinstance(images["patch_size"], int)
        assert {"image_mean", "image_std", "size"} <= set(images)
        assert "chat_template" in json.loads((directory / "tokenizer_config.json").read_text())
    values = json.loads((onnx_artifact("qwen2-vl-digits").path / "config.json").read_text())
    assert {"num_hidden_layers", "num_key_value_heads", "num_attention_heads", "hidden_size"} <= set(values)
    assert {"image_token_id", "video_token_id", "vision_start_token_id", "vision_config"} <= set(values)
    assert values["model_type"] == "qwen2_vl"
    assert values["transformers.js_config"]["dtype"] == "fp32"  # files without a suffix, in a browser too
    processor = json.loads((onnx_artifact("pixtral-digits").path / "processor_config.json").read_text())
    assert {"image_token", "image_break_token", "image_end_token", "patch_size", "spatial_merge_size"} <= set(processor)
