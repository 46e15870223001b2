"""A trained model under others' calls: saving, resuming, counting, and PEFT's methods."""

from __future__ import annotations

import json
import pickle
import shutil

import peft
import pytest
import torch
from adapters import fill_adapter
from parity import MODEL_FP32, assert_close
from safetensors.torch import load_file
from tiny import ATTENDED, BATCH, LABELS
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments
from trl.trainer.utils import create_model_from_path, get_config_model_id

import vlmbuild
from vlmbuild.builder.build import build
from vlmbuild.errors import UsageError
from vlmbuild.recipe import Recipe

DATA = [{**BATCH, "labels": LABELS}]


def trainer(model, output, **options):
    arguments = TrainingArguments(
        str(output),
        max_steps=options.pop("max_steps", 1),
        per_device_train_batch_size=1,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-2,
        **options,
    )
    return Trainer(model.train(), arguments, lambda samples: samples[0], DATA)


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits[ATTENDED].float()


@pytest.fixture
def adapted(nf4):
    model, _ = vlmbuild.load(nf4.path)
    vlmbuild.add_lora(model, r=4)
    return fill_adapter(model)


def test_a_trainers_output_is_an_adapter_and_resumes(nf4, adapted, tmp_path):
    first = trainer(adapted, tmp_path / "run", save_steps=1)
    first.train()
    first.save_model(str(tmp_path / "final"))
    expected = logits(adapted)
    for directory in (tmp_path / "final", tmp_path / "run" / "checkpoint-1"):
        names = {file.name for file in directory.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= names
        assert (directory / "model.safetensors").samefile(directory / "adapter_model.safetensors")
        model, _ = vlmbuild.load(nf4.path)
        vlmbuild.load_adapter(model, directory)
        assert torch.equal(logits(model), expected)
    model, _ = vlmbuild.load(nf4.path)
    vlmbuild.add_lora(model, r=4)
    again = trainer(model, tmp_path / "run", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert torch.equal(logits(model), expected)


def test_other_targets_than_the_checkpoints_are_refused(nf4, adapted, tmp_path):
    first = trainer(adapted, tmp_path / "run", save_steps=1)
    first.train()
    wider, _ = vlmbuild.load(nf4.path)
    vlmbuild.add_lora(wider, r=4, vision=True)
    with pytest.raises(UsageError, match=r"other layers.*the checkpoint lacks model\.visual.*add_lora"):
        trainer(wider, tmp_path / "run", max_steps=2).train(resume_from_checkpoint=True)
    bare, _ = vlmbuild.load(nf4.path)
    with pytest.raises(UsageError, match="the model lacks"):
        bare.load_state_dict(load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors"), strict=False)


@pytest.mark.parametrize("artifact", ["plain", "nf4"])
def test_a_model_that_was_trained_whole_is_a_checkpoint(artifact, request, tmp_path):
    source = request.getfixturevalue(artifact)
    model, _ = vlmbuild.load(source.path)
    whole = trainer(model, tmp_path / "run", save_strategy="no")
    whole.train()
    whole.save_model(str(tmp_path / "final"))
    expected = logits(model)
    built = build(tmp_path / "final", tmp_path / "artifact", Recipe(dtype="float32"))
    assert_close(logits(vlmbuild.load(built.path)[0]), expected, MODEL_FP32)
    state = load_file(tmp_path / "final" / "model.safetensors")
    other, _ = vlmbuild.load(source.path)
    other.load_state_dict(state, strict=False)
    assert_close(logits(other), expected, MODEL_FP32)
    assert not torch.equal(logits(vlmbuild.load(source.path)[0]), expected)
    if artifact == "plain":
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "final", dtype=torch.float32)
        assert_close(logits(theirs), expected, MODEL_FP32)


def test_nothing_is_saved_into_the_models_artifact(nf4):
    model, _ = vlmbuild.load(nf4.path)
    with pytest.raises(UsageError, match="holds the artifact that this model reads"):
        model.save_pretrained(nf4.path)


def test_signatures_and_cards_of_the_artifact_stay_behind(plain, tmp_path):
    source = shutil.copytree(plain.path, tmp_path / "artifact")
    for name in ("model.sig", "README.md"):
        (source / name).write_text("about the artifact")
    vlmbuild.load(source)[0].save_pretrained(tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"config.json", "tokenizer.json"} <= names and not {"model.sig", "README.md"} & names


def test_options_of_checkpointing_without_an_effect_are_said(plain):
    model, _ = vlmbuild.load(plain.path)
    with pytest.warns(UserWarning, match="ignores context_fn"):
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": None})


def test_shards_have_an_index(plain, tmp_path):
    model, _ = vlmbuild.load(plain.path)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def test_pefts_wrappers_name_add_lora(nf4, tmp_path, adapted):
    config = peft.LoraConfig(target_modules=["q_proj"])
    model, _ = vlmbuild.load(nf4.path)
    with pytest.raises(ValueError, match=r"vlmbuild\.add_lora"):
        peft.get_peft_model(model, config)
    vlmbuild.save_adapter(adapted, tmp_path)
    with pytest.raises(ValueError, match=r"vlmbuild\.add_lora"):
        peft.PeftModel.from_pretrained(vlmbuild.load(nf4.path)[0], tmp_path)
    with pytest.raises(UsageError, match=r"vlmbuild\.add_lora\(model, r=16\)"):
        model.add_adapter(config)
    with pytest.raises(UsageError, match=r"vlmbuild\.load_adapter"):
        model.load_adapter(tmp_path)
    with pytest.raises(UsageError, match=r"vlmbuild\.from_pretrained"):
        type(model).from_pretrained(nf4.path)


def test_weights_that_others_convert_are_followed(nf4):
    model, _ = vlmbuild.load(nf4.path, dtype="bfloat16")
    model = peft.prepare_model_for_kbit_training(model)
    vlmbuild.add_lora(model, r=4)
    model(**BATCH, labels=LABELS).loss.backward()
    assert model.dtype == torch.float32
    assert_close(logits(model), logits(vlmbuild.load(nf4.path, dtype="bfloat16")[0].float()), MODEL_FP32)


def test_weights_that_others_convert_in_part_are_refused(nf4):
    model, _ = vlmbuild.load(nf4.path, dtype="bfloat16")
    norm = model.get_parameter("model.language_model.norm.weight")
    norm.data = norm.data.float()
    with pytest.raises(UsageError, match=r"model\.language_model\.norm\.weight is torch\.float32.*model\.to\(dtype\)"):
        model(**BATCH)


def test_parameters_are_counted_as_before_quantization(nf4, plain, reference, adapted, capsys):
    whole, _ = vlmbuild.load(plain.path)
    quantized, _ = vlmbuild.load(nf4.path)
    assert quantized.num_parameters() == whole.num_parameters() == reference.num_parameters()
    assert quantized.get_memory_footprint() < whole.get_memory_footprint()
    trainable = sum(parameter.numel() for _, parameter in adapted.trainable_parameters())
    adapted.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"trainable params: {trainable:,d} || all params: {reference.num_parameters() + trainable:,d}" in printed
    assert adapted.num_parameters(only_trainable=True) == trainable


def test_an_adapter_can_be_disabled(nf4, adapted):
    base, with_adapter = logits(vlmbuild.load(nf4.path)[0]), logits(adapted)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    with adapted.disable_adapter():
        assert_close(logits(adapted), base, MODEL_FP32)
        inside = adapted.generate(**BATCH, **options, return_dict_in_generate=True).logits[0]
    assert torch.equal(logits(adapted), with_adapter)
    outside = adapted.generate(**BATCH, **options, return_dict_in_generate=True).logits[0]
    assert not torch.allclose(inside, outside)


def test_modules_trained_whole_have_no_values_before(plain):
    model, _ = vlmbuild.load(plain.path)
    vlmbuild.add_lora(model, r=4, modules_to_save=["embed_tokens"])
    with pytest.raises(UsageError, match="embed_tokens was trained whole"), model.disable_adapter():
        pass


def test_merging_in_memory(plain, adapted):
    model, _ = vlmbuild.load(plain.path)
    with pytest.raises(UsageError, match="no adapter to merge"):
        model.merge_and_unload()
    vlmbuild.add_lora(model, r=4, vision=True, modules_to_save=["embed_tokens"])
    expected = logits(fill_adapter(model))
    merged = model.merge_and_unload()
    assert merged is model and model.adapter is None and not any("lora" in name for name in model.state_dict())
    assert_close(logits(model), expected, MODEL_FP32)
    vlmbuild.add_lora(model, r=2)
    with pytest.raises(UsageError, match=r"is quantized.*vlmbuild build SOURCE --adapter"):
        adapted.merge_and_unload()


def test_it_is_pickled(adapted):
    again = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(logits(again), logits(adapted))


def test_trainers_find_the_reference_by_the_configs_name(plain):
    """DPO without `ref_model` and GRPO with `beta` load the reference model by this name."""
    model, _ = vlmbuild.load(plain.path)
    vlmbuild.add_lora(model, r=4)
    reference = create_model_from_path(get_config_model_id(model.config))
    with model.disable_adapter():
        assert_close(logits(model), logits(reference), MODEL_FP32)
    assert model.name_or_path == str(plain.path)
