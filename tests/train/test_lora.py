"""Adapters: PEFT reads ours, we read PEFT's, and others are refused before the model changes."""

from __future__ import annotations

import copy
import json
import shutil

import peft
import pytest
import torch
from adapters import fill_adapter
from checkpoints import dequantized
from parity import SAME_WEIGHTS_FP32, assert_close
from safetensors.torch import load_file, save_file
from tiny import ATTENDED, BATCH
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.errors import SourceError, UsageError


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits[ATTENDED]


@pytest.fixture(scope="module")
def dequantized_base(nf4):
    return dequantized(AutoModelForImageTextToText.from_pretrained(nf4.path))


@pytest.fixture
def base(dequantized_base):
    """transformers' model with the values of the artifact's 4-bit weights."""
    return copy.deepcopy(dequantized_base)


@pytest.fixture
def adapted(nf4):
    model, _ = vlmbuild.load(nf4.path)
    vlmbuild.add_lora(model, r=4, alpha=12)
    return fill_adapter(model, 0.2)


def test_peft_reads_ours(adapted, base, nf4, tmp_path):
    before = logits(vlmbuild.load(nf4.path)[0])
    vlmbuild.save_adapter(adapted, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (logits(adapted) - before).norm() > 0.05 * before.norm()
    assert_close(logits(adapted), logits(theirs), SAME_WEIGHTS_FP32)


def test_we_read_pefts(base, nf4, tmp_path):
    targets = ["q_proj", "up_proj", "down_proj", "fc1", "of_other_models"]
    theirs = fill_adapter(peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)), 0.2)
    theirs.save_pretrained(tmp_path)
    ours, _ = vlmbuild.load(nf4.path)
    vlmbuild.load_adapter(ours, tmp_path)
    assert_close(logits(ours), logits(theirs), SAME_WEIGHTS_FP32)


def test_round_trip_through_a_compiled_model(adapted, nf4, tmp_path):
    vlmbuild.save_adapter(torch.compile(adapted, backend="eager"), tmp_path)
    again, _ = vlmbuild.load(nf4.path)
    vlmbuild.load_adapter(torch.compile(again, backend="eager"), tmp_path)
    assert torch.equal(logits(again), logits(adapted))


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_dropout": 0.3, "layers_to_transform": [0, 2]},
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
            "modules_to_save": ["merger"],
        },
    ],
    ids=["rslora, dropout, layers", "patterns, modules"],
)
def test_we_read_pefts_variants(options, base, dequantized_base, nf4, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    theirs = fill_adapter(peft.get_peft_model(base, config), 0.2).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = vlmbuild.load(nf4.path)
    vlmbuild.load_adapter(ours, tmp_path / "theirs")
    expected = logits(theirs)
    assert_close(logits(ours), expected, SAME_WEIGHTS_FP32)
    trainable = {
        name.replace("base_model.model.", "").replace("modules_to_save.default.", "")
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert {name for name, _ in ours.trainable_parameters()} == trainable

    vlmbuild.save_adapter(ours, tmp_path / "ours")
    fresh = copy.deepcopy(dequantized_base)
    assert_close(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")), expected, SAME_WEIGHTS_FP32)


def test_peft_reads_tied_embeddings_that_were_trained(base, nf4, tmp_path):
    ours, _ = vlmbuild.load(nf4.path)
    vlmbuild.add_lora(ours, r=2, modules_to_save=["lm_head"])
    with torch.no_grad():
        ours.lm_head.weight.add_(0.1 * torch.randn_like(ours.lm_head.weight))
    vlmbuild.save_adapter(fill_adapter(ours, 0.2), tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert_close(logits(ours), logits(theirs), SAME_WEIGHTS_FP32)
    again, _ = vlmbuild.load(nf4.path)
    vlmbuild.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_untied_embeddings_of_an_adapter_are_refused(base, nf4, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="lm_head.weight differs from .*embed_tokens.weight, but the model has one"):
        vlmbuild.load_adapter(vlmbuild.load(nf4.path)[0], tmp_path)


def test_dropout_acts_in_training_only_and_the_same_in_recomputation(nf4):
    model, _ = vlmbuild.load(nf4.path)
    vlmbuild.add_lora(model, r=4, dropout=0.5)
    fill_adapter(model, 0.2)
    labels = BATCH["input_ids"].masked_fill(~ATTENDED, -100)
    labels[BATCH["mm_token_type_ids"] > 0] = -100
    assert torch.equal(logits(model), logits(model))

    def step(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = model.train()(**BATCH, labels=labels).loss
        loss.backward()
        return loss.item(), [p.grad.clone() for _, p in model.trainable_parameters()]

    plain, other = step(1), step(2)
    assert plain[0] != other[0] != model.eval()(**BATCH, labels=labels).loss.item()
    model.gradient_checkpointing_enable()
    again = step(1)
    assert again[0] == plain[0]
    assert all(torch.equal(one, two) for one, two in zip(again[1], plain[1], strict=True))


def test_layers_get_graphs_of_their_own_and_only_they_train(nf4):
    model, _ = vlmbuild.load(nf4.path)
    before = logits(model)
    vlmbuild.add_lora(model, r=4, layers=[1])
    assert torch.equal(logits(model), before)
    assert {name.split(".")[3] for name, _ in model.trainable_parameters()} == {"1"}
    assert len(list(model.trainable_parameters())) == 7 * 2


def edit_config(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory, change):
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


SPOILT = [
    (lambda d: (d / "adapter_config.json").unlink(), "not a readable adapter"),
    (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x"), "not a readable adapter"),
    (lambda d: edit_config(d, peft_type="LOHA"), "only plain LoRA adapters can be loaded, not LOHA"),
    (lambda d: edit_config(d, use_dora=True), "use_dora"),
    (lambda d: edit_config(d, bias="all"), "bias='all'"),
    (lambda d: edit_config(d, r=0), "r is 0"),
    (lambda d: edit_config(d, modules_to_save=["nowhere"]), "no module of the model is named 'nowhere'"),
    (
        lambda d: edit_weights(d, lambda t: t.pop(f"{FIRST}.lora_B.weight")),
        "q_proj.lora_B.default.weight is missing",
    ),
    (
        lambda d: edit_weights(d, lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(4, 7)})),
        r"shape \[4, 7\]",
    ),
    (
        lambda d: (
            edit_weights(d, lambda t: t.update({"base_model.model.other.lora_A.weight": torch.ones(4, 7)})),
            edit_config(d, target_modules=".*"),
        ),
        "other is not a linear layer",
    ),
    (lambda d: edit_config(d, target_modules=["qkv_proj", "fc3"]), r"\(qkv_proj, fc3\) does not match .*_proj"),
    (lambda d: edit_config(d, target_modules=r".*\.q_proj"), r"\(\.\*\\\.q_proj\) does not match .*_proj"),
    (lambda d: edit_config(d, target_modules="("), "not a readable adapter"),
    (lambda d: edit_config(d, target_modules=[7]), "target_modules"),
]


def test_adapters_that_do_not_fit(adapted, nf4, tmp_path):
    vlmbuild.save_adapter(adapted, tmp_path / "whole")
    model, _ = vlmbuild.load(nf4.path)
    before = set(model.state_dict())
    for number, (spoil, message) in enumerate(SPOILT):
        directory = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        spoil(directory)
        with pytest.raises(SourceError, match=message):
            vlmbuild.load_adapter(model, directory)
        assert set(model.state_dict()) == before


def test_adapter_without_the_modules_that_it_trained(nf4, tmp_path):
    model, _ = vlmbuild.load(nf4.path)
    vlmbuild.add_lora(model, r=2, modules_to_save=["visual.merger"])
    vlmbuild.save_adapter(model, tmp_path)
    edit_weights(tmp_path, lambda t: [t.pop(name) for name in list(t) if "merger" in name])
    with pytest.raises(SourceError, match=r"visual\.merger\..* is missing, though adapter_config.json says"):
        vlmbuild.load_adapter(vlmbuild.load(nf4.path)[0], tmp_path)


def test_frozen_adapter_is_still_in_the_state_dict(adapted):
    trained = set(adapted.state_dict())
    assert len(trained) == 3 * 7 * 2
    adapted.requires_grad_(False)
    assert set(adapted.state_dict()) == trained
    with pytest.raises(RuntimeError, match="Missing key"):
        adapted.load_state_dict({})


def test_second_adapter_of_a_name_is_refused_whatever_it_asks_for(adapted):
    with pytest.raises(UsageError, match=r"has an adapter 'default' already.*adapter_name"):
        vlmbuild.add_lora(adapted, target="nothing")


def test_saving_without_an_adapter(nf4, tmp_path):
    with pytest.raises(UsageError, match="no adapter to save"):
        vlmbuild.save_adapter(vlmbuild.load(nf4.path)[0], tmp_path)
    with pytest.raises(UsageError, match=r"Expected a model from vlmbuild.load, got Linear"):
        vlmbuild.save_adapter(torch.nn.Linear(1, 1), tmp_path)
