"""Unsloth's names: a notebook's calls in its order, and every argument either does something, or is named."""

from __future__ import annotations

import inspect
import shutil

import pytest
import torch
from adapters import fill_adapter
from checkpoints import edit_config
from parity import MODEL_FP32, assert_close
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild import FastVisionModel, UnslothVisionDataCollator
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import LARGEST, exact_match
from vlmbuild.errors import UsageError
from vlmbuild.runtime.torch.checkpointing import Checkpointing
from vlmbuild.zoo import ZOO


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Each form of the checkpoint is built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMBUILD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def conversation(sample):
    return {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": LARGEST.question}, {"type": "image", "image": sample.image}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": LARGEST.answer(sample.digits)}]},
        ]
    }


def loaded(**options):
    return FastVisionModel.from_pretrained("qwen2-vl-digits", dtype=torch.float32, **options)


def test_notebook_from_loading_to_saving_and_back(tmp_path):
    model, tokenizer = loaded(load_in_4bit=True, use_gradient_checkpointing="unsloth", max_seq_length=256)
    assert any(region.recipes for region in model.program.regions.values())
    assert not list(model.trainable_parameters())
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=True,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=8,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    assert {name.partition(".layers.")[0].partition(".blocks.")[0] for name, _ in model.trainable_parameters()} == {
        "model.language_model",
        "model.visual",
    }
    FastVisionModel.for_training(model)
    assert model.training and model.checkpointing == Checkpointing()  # offloading is for GPUs
    collator = UnslothVisionDataCollator(model, tokenizer)
    assert collator.collator.max_length == 256
    data = [conversation(sample) for sample in Digits("train", 1).take(64)]
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=4e-3)
    losses = []
    for start in range(0, 64, 16):
        loss = model(**collator(data[start : start + 16])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    FastVisionModel.for_inference(model)
    assert not model.training
    text = tokenizer.apply_chat_template(data[0]["messages"][:1], add_generation_prompt=True)
    image = data[0]["messages"][0]["content"][1]["image"]
    inputs = tokenizer(image, text, add_special_tokens=False, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=3, use_cache=True, temperature=1.5, min_p=0.1)
    assert answer.shape[1] > inputs["input_ids"].shape[1]

    model.save_pretrained(tmp_path / "lora_model")
    again, _ = FastVisionModel.from_pretrained(
        model_name=tmp_path / "lora_model", dtype=torch.float32, load_in_4bit=True
    )
    samples = Digits("held_out", 2).take(20)
    with torch.no_grad():
        batch = collator(data[:2])
        assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)
    assert exact_match(again, tokenizer, LARGEST, samples) == exact_match(model, tokenizer, LARGEST, samples)


def with_spare_rows(directory):
    """The packaged checkpoint with more embeddings than its tokenizer has tokens, as the published one has."""
    shutil.copytree(ZOO["qwen2-vl-digits"], directory)
    tensors = load_file(directory / "model.safetensors")
    (name,) = (name for name in tensors if "embed_tokens" in name)
    tensors[name] = torch.cat([tensors[name], tensors[name][:64]])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, lambda values: values["text_config"].update(vocab_size=len(tensors[name])))
    return directory


def test_merged_model_answers_like_the_adapter(tmp_path):
    model, tokenizer = FastVisionModel.from_pretrained(with_spare_rows(tmp_path / "source"), dtype=torch.float32)
    FastVisionModel.get_peft_model(model, r=4)
    fill_adapter(model, 0.02)
    tokenizer.tokenizer.add_tokens(["<|medicine|>"])
    tokenizer.chat_template = "{# changed #}" + tokenizer.chat_template
    token = tokenizer.tokenizer.convert_tokens_to_ids("<|medicine|>")
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    merged, processor = vlmbuild.load(tmp_path / "merged")
    assert processor.tokenizer("<|medicine|>").input_ids == [token]
    assert processor.chat_template == tokenizer.chat_template
    batch = UnslothVisionDataCollator(merged, processor)([conversation(s) for s in Digits("train", 1).take(3)])
    with torch.no_grad():
        ours, theirs = merged(**batch).logits, model.eval()(**batch).logits
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    with pytest.warns(UserWarning, match="tokenizer makes no difference"):
        model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    tokenizer.tokenizer.add_tokens([f"<|{number}|>" for number in range(200)])
    with pytest.raises(UsageError, match=r"embeddings for 0 to 383.*resize_token_embeddings\(len\(tokenizer\)\)"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer)
    processor.image_processor.size["longest_edge"] //= 2
    with pytest.raises(UsageError, match="image settings differ"):
        model.save_pretrained_merged(tmp_path / "x", processor)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(UsageError, match="save_method 'gguf' is unknown"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, save_method="gguf")


def test_merged_model_has_the_rows_of_added_tokens(tmp_path):
    model, tokenizer = loaded(load_in_4bit=True)
    tokenizer.tokenizer.add_tokens(["<|medicine|>", "<|dose|>"])
    model.resize_token_embeddings(len(tokenizer.tokenizer), pad_to_multiple_of=32)
    FastVisionModel.get_peft_model(model, r=4, modules_to_save=["embed_tokens", "lm_head"])
    fill_adapter(model, 0.02)
    with torch.no_grad():
        model.lm_head.weight[-31:].normal_()
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    merged, processor = vlmbuild.load(tmp_path / "merged")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    batch = UnslothVisionDataCollator(merged, processor)([conversation(s) for s in Digits("train", 1).take(3)])
    batch["input_ids"][:, -2:] = torch.tensor(processor.tokenizer("<|medicine|><|dose|>").input_ids)
    labels, attended = batch.pop("labels"), batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model.eval()(**batch).logits[attended]
        assert expected.shape[-1] == 352 and labels.max() < 352
        assert_close(merged(**batch).logits[attended], expected, MODEL_FP32)
        assert_close(theirs(**batch).logits[attended], expected, MODEL_FP32)


@pytest.mark.parametrize(
    ("options", "formats"),
    [({"load_in_4bit": False}, set()), ({"load_in_8bit": True}, {"int8"}), ({"load_in_16bit": True}, set())],
)
def test_formats(options, formats):
    model, _ = loaded(**options)
    found = {recipe.format.name for region in model.program.regions.values() for recipe in region.recipes}
    assert found == formats


def test_full_finetuning_trains_everything():
    model, _ = loaded(full_finetuning=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_quantized_source_keeps_its_format(nf4):
    model, _ = FastVisionModel.from_pretrained(nf4.path)
    assert model.path == nf4.path  # an artifact is loaded as it is


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loaded(fast_inference=True), "from_pretrained: fast_inference=True has no equivalent. Serve"),
        (lambda: loaded(token="hf_x"), "HF_TOKEN"),
        (lambda: loaded(trust_remote_code=True), "No code of a checkpoint is ever run"),
        (lambda: loaded(load_in_4bits=True), "unknown argument 'load_in_4bits'"),
        (lambda: loaded(load_in_8bit=True, load_in_16bit=True), "exclude each other"),
        (lambda: loaded(device_map={"model.visual": 0, "lm_head": 1}), "a model is on one device"),
        (lambda: FastVisionModel.from_pretrained("qwen2-vl-digits", dtype="float8"), "none that a model computes in"),
        (
            lambda: FastVisionModel.get_peft_model(loaded()[0], bias="all"),
            "get_peft_model: bias='all' has no equivalent",
        ),
        (lambda: FastVisionModel.get_peft_model(loaded()[0], loftq_config={"bits": 4}), "loftq_config"),
        (lambda: FastVisionModel.get_peft_model(loaded()[0], target_modules=["q_porj"]), "'q_porj' matches no linear"),
        (lambda: UnslothVisionDataCollator(*loaded(), resize=512), "longest_edge"),
    ],
)
def test_arguments_without_an_equivalent_are_named(call, message):
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"load_in_8bit": True}, "load_in_8bit: .* holds nf4 weights"),
        ({"load_in_16bit": True}, r"load_in_16bit \(or full_finetuning\): .* holds nf4"),
        ({"full_finetuning": True}, "holds nf4 weights"),
        ({"load_in_4bit": False}, "load_in_4bit=False: .* holds nf4 weights"),
        ({"revision": "main"}, "artifacts have none"),
    ],
)
def test_formats_that_an_artifact_has_not(options, named, nf4):
    with pytest.raises(UsageError, match=named):
        FastVisionModel.from_pretrained(nf4.path, **options)


def test_arguments_that_make_no_difference_are_named_too():
    with pytest.warns(UserWarning, match="from_pretrained: gpu_memory_utilization makes no difference"):
        loaded(gpu_memory_utilization=0.5)


def test_defaults_that_a_notebook_writes_out_are_silent(recwarn):
    model, processor = loaded(fast_inference=False, token=None, trust_remote_code=False, rope_scaling=None)
    FastVisionModel.get_peft_model(model, bias="none", init_lora_weights=True, loftq_config={})
    UnslothVisionDataCollator(model, processor, resize="min", ignore_index=-100)
    assert not [warning for warning in recwarn if "difference" in str(warning.message)]


def test_formatting_function_makes_the_samples():
    model, processor = loaded()
    collator = UnslothVisionDataCollator(model, processor, formatting_func=conversation, train_on_responses_only=True)
    batch = collator(Digits("train", 1).take(2))
    assert (batch["labels"] >= 0).sum() == 4  # a digit and the end of the turn, twice
    assert isinstance(Digits("train", 1).take(1)[0].image, Image.Image)


def test_adapter_without_a_base_model(model, tmp_path):
    vlmbuild.add_lora(model, r=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="does not name its base model"):
        FastVisionModel.from_pretrained(tmp_path)


def test_arguments_are_unsloths():
    """Names that notebooks use, by keyword."""
    names = {
        FastVisionModel.from_pretrained: {"model_name", "max_seq_length", "dtype", "load_in_4bit", "full_finetuning"},
        FastVisionModel.get_peft_model: {"r", "lora_alpha", "finetune_vision_layers", "use_rslora", "modules_to_save"},
        FastVisionModel.for_training: {"model", "use_gradient_checkpointing"},
        FastVisionModel.save_pretrained_merged: {"save_directory", "tokenizer", "save_method"},
    }
    for function, expected in names.items():
        assert expected <= set(inspect.signature(function).parameters)
