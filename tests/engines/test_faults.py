"""Faults that engines have had, planted in the checkpoint that transformers opens or in transformers itself: each is found, and the
first stage that differs is named."""

from __future__ import annotations

import json

import engine_here
import pytest
import torch
from adapters import write_adapter
from checkpoints import copied, edit_processor, edit_weights
from safetensors.torch import load_file
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

import vlmbuild
from vlmbuild.engines import ENGINES
from vlmbuild.engines.ask import ask
from vlmbuild.golden.cases import packaged_cases
from vlmbuild.golden.compare import compare, first_difference
from vlmbuild.golden.record import record_artifact
from vlmbuild.zoo import ZOO

CASES = [packaged_cases()[index] for index in (0, 3)]
"""One image, which the processor resizes, and a text."""


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)


@pytest.fixture(scope="module")
def golden(zoo_artifact):
    """(zoo checkpoint) -> its artifact, and what its program computes."""
    known = {}

    def golden(name):
        if name not in known:
            directory = zoo_artifact(name, dtype="float32").path
            known[name] = directory, record_artifact(directory, "trainable", CASES)
        return known[name]

    return golden


def first_stage(model, records):
    """Run transformers on a folder; the stage that differs first, without the layer's number, or None."""
    engine = ENGINES["transformers"]
    answers = ask(engine, model, records)
    first = first_difference(compare(records, answers.cases, engine.limits("float32")))
    return first and first.stage


def wrong_filter(directory):
    edit_processor(directory, lambda values: values.update(resample=2))  # bilinear


def swapped_mean_and_std(directory):
    def swap(values):
        values["image_mean"], values["image_std"] = values["image_std"], values["image_mean"]

    edit_processor(directory, swap)


def lost_chat_template(directory):
    (directory / "chat_template.jinja").unlink()


def other_chat_template(directory):
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{% endfor %}"
    )


def permuted(weight, heads):
    """Order a head's rows as a converter does for the other layout of rotations: halves instead of pairs."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def swapped_permutation(directory):
    text = json.loads((directory / "config.json").read_text())
    text = text.get("text_config", text)

    def permute(tensors):
        for name in [name for name in tensors if ".layers." in name and "visual" not in name]:
            for module, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if f".{module}." in name:
                    tensors[name] = permuted(tensors[name], text[heads]).contiguous()

    edit_weights(directory, permute)


@pytest.mark.parametrize(
    ("plant", "stage"),
    [
        (lambda _: None, None),
        (wrong_filter, "pixels"),
        (swapped_mean_and_std, "pixels"),
        (lost_chat_template, "tokens"),
        (other_chat_template, "tokens"),
        (swapped_permutation, "hidden.0"),
    ],
    ids=["none", "filter", "mean and std", "no template", "other template", "q/k permutation"],
)
def test_a_fault_in_the_checkpoint(golden, tmp_path, plant, stage):
    directory, records = golden("qwen2-vl-digits")
    served = copied(directory, tmp_path / "served")
    plant(served)
    assert first_stage(served, records) == stage


def test_positions_that_are_off_by_one(golden, monkeypatch):
    directory, records = golden("qwen2-vl-digits")
    kind = modeling_qwen2_vl.Qwen2VLModel
    original = kind.get_rope_index

    def shifted(self, input_ids, *args, **options):
        positions, deltas = original(self, input_ids, *args, **options)
        last = int((input_ids[0] == self.config.image_token_id).nonzero().max())
        positions[..., last + 1 :] += 1
        return positions, deltas

    monkeypatch.setattr(kind, "get_rope_index", shifted)
    assert first_stage(directory, records) == "hidden.0"


def test_an_adapter_that_is_lost_on_the_tower(golden, tmp_path):
    base, _ = golden("qwen2-vl-digits")
    adapter = write_adapter(base, tmp_path / "adapter", vision=True)
    merged = vlmbuild.build(base, tmp_path / "merged", vlmbuild.Recipe(dtype="float32"), adapter=adapter).path
    records = record_artifact(merged, "trainable", CASES)
    served = copied(merged, tmp_path / "served")
    before = load_file(base / "model.safetensors")
    edit_weights(served, lambda tensors: tensors.update({name: x for name, x in before.items() if "visual" in name}))
    assert first_stage(merged, records) is None
    assert first_stage(served, records) == "features"


@pytest.mark.slow
def test_positions_that_are_interpolated_between_other_corners(tmp_path, monkeypatch):
    """The zoo's positions are a hundredth of its patches: ten times as large they matter as in published models."""
    source = copied(ZOO["qwen3-vl-digits"], tmp_path / "source")
    edit_weights(
        source, lambda tensors: [x.mul_(10) for name, x in tensors.items() if name.endswith("pos_embed.weight")]
    )
    directory = vlmbuild.build(source, tmp_path / "artifact", vlmbuild.Recipe(dtype="float32")).path
    records = record_artifact(directory, "trainable", CASES)
    assert first_stage(directory, records) is None
    name = "get_vision_interpolation_indices_and_weights"
    original = getattr(modeling_qwen3_vl, name)
    monkeypatch.setattr(
        modeling_qwen3_vl, name, lambda *args, **options: original(*args, **{**options, "align_corners": False})
    )
    assert first_stage(directory, records) == "patches"


def test_noise_below_the_tolerance_is_no_fault(golden, tmp_path):
    directory, records = golden("qwen2-vl-digits")
    served = copied(directory, tmp_path / "served")
    edit_weights(served, lambda tensors: [x.mul_(1 + 1e-6 * torch.randn_like(x)) for x in tensors.values()])
    assert first_stage(served, records) is None
