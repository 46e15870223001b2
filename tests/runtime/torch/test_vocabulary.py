"""Added tokens: tables resized as transformers resizes them, trained, generated from, saved, and opened again."""

from __future__ import annotations

import peft
import pytest
import torch
from adapters import fill_adapter
from parity import MODEL_FP32, assert_close
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.builder.build import build
from vlmbuild.demo.digits import Digits
from vlmbuild.errors import BatchError, SourceError, UsageError
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.runtime.torch.vocabulary import set_config_rows

TOKENS = [f"<|added {number}|>" for number in range(5)]
BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module", params=["qwen2-vl-digits", "pixtral-digits"], ids=["tied", "untied"])
def artifact(request, zoo_artifact):
    return zoo_artifact(request.param, dtype="float32").path


def grown(artifact):
    """Load a model and its processor, and add tokens that no checkpoint has rows for."""
    model, processor = vlmbuild.load(artifact)
    spare = model.vocabulary - len(processor.tokenizer)
    processor.tokenizer.add_tokens([*(f"<|spare {number}|>" for number in range(spare)), *TOKENS])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(processor.tokenizer))
    return model, processor


def batch_of(processor, samples=2):
    """Questions with an image and added tokens, which are answers too."""
    pairs = zip(Digits("train", 1).take(samples), TOKENS, strict=False)
    messages = [
        (sample, [{"role": "user", "content": f"<image>Is it {token}?"}, {"role": "assistant", "content": token}])
        for sample, token in pairs
    ]
    return vlmbuild.VisionDataCollator(processor)([{"messages": m, "images": [s.image]} for s, m in messages])


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits[batch["attention_mask"].bool()]


def step(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    loss = model.train()(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    "arguments",
    [(325,), (325, None, False), (325, 64), (None, 96), (None,), (320,)],
    ids=["mean", "normal", "multiple", "multiple of all", "nothing", "same"],
)
def test_rows_are_transformers_rows(artifact, arguments):
    ours, _ = vlmbuild.load(artifact)
    theirs = AutoModelForImageTextToText.from_pretrained(artifact, dtype=torch.float32)
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.resize_token_embeddings(*arguments)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(ours, name)().weight, getattr(theirs, name)().weight)
    assert ours.vocabulary == ours.config.get_text_config().vocab_size == theirs.config.get_text_config().vocab_size
    assert ours.num_parameters() == theirs.num_parameters()


def test_rows_that_no_token_has_can_be_dropped(artifact):
    ours, _ = vlmbuild.load(artifact)
    ours.resize_token_embeddings(384)
    batch = batch_of(grown(artifact)[1])
    expected = logits(ours, batch)[:, :325]
    ours.resize_token_embeddings(325)
    assert torch.equal(logits(ours, batch), expected)
    with pytest.raises(BatchError, match=r"embeddings for 0 to 319.*resize_token_embeddings"):
        vlmbuild.load(artifact)[0](**batch)
    if ours.program.ties:
        with pytest.raises(UsageError, match=r"300 rows leave out a token of the model.*pad_token_id 307"):
            ours.resize_token_embeddings(300)


def test_trained_whole_and_saved_as_a_checkpoint(artifact, tmp_path):
    model, processor = grown(artifact)
    batch = batch_of(processor)
    losses = [step(model, batch) for _ in range(3)]
    assert losses[2] < losses[0]
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_close(logits(theirs, batch), expected, MODEL_FP32)
    if model.program.ties:  # a trace of another size takes seconds
        built = build(tmp_path / "saved", tmp_path / "built", Recipe(dtype="float32"))
        again, reopened = vlmbuild.load(built.path)
        assert_close(logits(again, batch_of(reopened)), expected, MODEL_FP32)


def test_an_adapter_stores_the_rows_for_peft_and_for_us(artifact, tmp_path):
    model, processor = grown(artifact)
    with pytest.raises(UsageError, match=r'modules_to_save=\["embed_tokens", "lm_head"\]'):
        vlmbuild.add_lora(model, r=2)
    vlmbuild.add_lora(model, r=2, modules_to_save=BOTH)
    batch = batch_of(processor)
    fill_adapter(model, 0.02)
    step(model, batch)
    expected = logits(model, batch)
    vlmbuild.save_adapter(model, tmp_path / "adapter")

    fresh, _ = vlmbuild.load(artifact)
    vlmbuild.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh, batch), expected)
    base = AutoModelForImageTextToText.from_pretrained(artifact, dtype=torch.float32)
    base.resize_token_embeddings(len(processor.tokenizer))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_close(logits(theirs, batch), expected, MODEL_FP32)
    one = {name: value for name, value in batch_of(processor, 1).items() if name != "labels"}
    tokens = [model.eval().generate(**one, max_new_tokens=3, do_sample=False) for model in (fresh, theirs)]
    assert torch.equal(*tokens)
    processor.save_pretrained(tmp_path / "adapter")
    assert_close(logits(peft.AutoPeftModel.from_pretrained(tmp_path / "adapter"), batch), expected, MODEL_FP32)

    with pytest.raises(SourceError, match=r"325 rows, not 320.*resize_token_embeddings\(325\)"):
        build(artifact, tmp_path / "built", Recipe(dtype="float32"), adapter=tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(logits(merged, batch), expected, MODEL_FP32)


def test_adapters_of_peft_whose_tables_were_resized(artifact, tmp_path):
    """PEFT stores resized tables, if asked to, without naming their modules in the config."""
    _, processor = grown(artifact)
    theirs = AutoModelForImageTextToText.from_pretrained(artifact, dtype=torch.float32)
    theirs.resize_token_embeddings(len(processor.tokenizer))
    theirs = fill_adapter(peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"])))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours, _ = vlmbuild.load(artifact)
    vlmbuild.load_adapter(ours, tmp_path)
    batch = batch_of(processor)
    assert_close(logits(ours, batch), logits(theirs, batch), MODEL_FP32)


def test_compiled_models_follow(plain):
    model, _ = vlmbuild.load(plain.path)
    batch = {"input_ids": torch.arange(12).view(1, 12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    compiled = torch.compile(model, backend="eager")
    logits(compiled, batch)
    model.resize_token_embeddings(352)
    batch["input_ids"][0, 3:6] = torch.tensor([349, 350, 351])
    found = logits(compiled, batch)
    torch._dynamo.reset()
    assert_close(found, logits(model, batch), MODEL_FP32)
    assert found.shape[-1] == 352


def test_models_that_cannot_be_resized(nf4, tmp_path):
    recipe = Recipe(dtype="float32", quantize=QuantSpec(roles=("language", "head")))
    head, _ = vlmbuild.load(build("pixtral-digits", tmp_path / "artifact", recipe).path)
    with pytest.raises(UsageError, match=r"lm_head is quantized.*--skip 'lm_head\*'"):
        head.resize_token_embeddings(400)
    model, _ = vlmbuild.load(nf4.path)
    for arguments in ((0,), (True,), (400.0,), (400, -1)):
        with pytest.raises(UsageError, match="a whole number, at least 1"):
            model.resize_token_embeddings(*arguments)
    vlmbuild.add_lora(model, r=2)
    with pytest.raises(UsageError, match=r"Resize before vlmbuild\.add_lora"):
        model.resize_token_embeddings(400)
    assert model.vocabulary == 320


@pytest.mark.parametrize("values", [{"text_config": {}}, {"vocab_size": 1}, {"text_config": {}, "vocab_size": 1}])
def test_every_layout_of_a_config_has_the_rows(values):
    set_config_rows(values, 7)
    assert values.get("vocab_size", 7) == 7
    assert values.get("text_config", {"vocab_size": 7}) == {"vocab_size": 7}
