"""Every family through the build: merged, quantized and dequantized, adapted by role, and its head kept."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from adapters import answer_logits, edit_adapter, fill_adapter, write_adapter
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from checkpoints import dequantized
from parity import MODEL_FP32, SAME_WEIGHTS_FP32, assert_close
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.quantizers.quantizers_utils import should_convert_module

import vlmbuild
from vlmbuild import FastVisionModel, UnslothVisionDataCollator
from vlmbuild.adapters.fit import with_module_names
from vlmbuild.adapters.peft_files import read_adapter
from vlmbuild.builder.build import build
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import LARGEST, prompt
from vlmbuild.errors import SourceError
from vlmbuild.families import FAMILIES
from vlmbuild.ir.program import join
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.zoo import CHECKPOINTS

FLOAT32 = Recipe(dtype="float32")
FORMATS = {
    "qwen2_vl": ("nf4",),
    "mllama": ("int8",),
    "pixtral": ("nf4",),
    "qwen2_5_vl": ("fp4", "int8"),
    "qwen3_vl": ("fp4", "int8"),
    "mistral3": ("fp4", "int8"),
    "smolvlm": ("fp4", "int8"),
    "gemma3": ("fp4", "int8"),
}
"""Formats to which a family's layers are quantized here, and back; `test_parity` has all families in NF4."""
INT8 = 1 / 127
"""Relative norm of logits: a rounding before the first int8 layer may turn inputs into the next integer, a step of 127."""


ON_RELEASE = {"qwen3_vl", "mistral3", "smolvlm"}
"""Families whose builds in every format, a minute of CPU each, run before a release."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.release if name in ON_RELEASE else ()) for name in FORMATS],
)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def source(family, checkpoint_of):
    return checkpoint_of(CHECKPOINTS.get(family, family))


@pytest.fixture(scope="module")
def base(family, zoo_artifact):
    """The checkpoint's artifact in float32."""
    return zoo_artifact(CHECKPOINTS.get(family, family), dtype="float32").path


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter of language and vision."""
    return write_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", vision=True)


def test_merged_weights_are_source_and_adapter(base, adapter, tmp_path):
    merged = build(base, tmp_path / "merged", FLOAT32, adapter=adapter)
    (record,) = merged.manifest.numerics
    assert float(record["error"]) <= 2e-6
    assert record["top1"] == record["tokens"]
    assert float(record["effect"]) > 0.01
    model, processor = vlmbuild.load(merged.path)
    theirs = AutoModelForImageTextToText.from_pretrained(base)
    before = answer_logits(theirs, processor)
    expected = answer_logits(peft.PeftModel.from_pretrained(theirs, adapter), processor)
    assert (expected - before).norm() > 0.01 * expected.norm()
    assert_close(answer_logits(model, processor), expected, MODEL_FP32)
    assert_close(
        answer_logits(AutoModelForImageTextToText.from_pretrained(merged.path), processor), expected, MODEL_FP32
    )


def test_adapters_with_names_of_older_versions(family, adapter, tmp_path):
    names = FAMILIES[family]
    if not names.published_prefixes:
        pytest.skip("its names are as published")
    old = shutil.copytree(adapter, tmp_path / "old")
    prefix = "base_model.model."
    edit_adapter(
        old, lambda t: {prefix + names.stored_name(key.removeprefix(prefix)): value for key, value in t.items()}
    )
    new, renamed = read_adapter(adapter), with_module_names(read_adapter(old), names, old)
    assert read_adapter(old).tensors.keys() != new.tensors.keys() == renamed.tensors.keys()
    assert renamed.loras == new.loras
    assert all(torch.equal(tensor, renamed.tensors[name]) for name, tensor in new.tensors.items())
    edit_adapter(old, lambda t: {**load_file(adapter / "adapter_model.safetensors"), **t})
    with pytest.raises(SourceError, match="twice, under an old and a new name"):
        with_module_names(read_adapter(old), names, old)


def skips_in_vllm(name, skipped):
    """Equivalent of `is_layer_skipped_bnb` in vLLM's bitsandbytes plugin: a whole component, or a leading part."""
    parts = name.split(".")
    leading = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return not leading.union(parts).isdisjoint(skipped)


def vllm_name(family, module):
    """Name a module as vLLM's model of the family does."""
    if family == "smolvlm":
        return module
    tower = ("model.vision_tower.", "vision_tower.vision_model." if family == "gemma3" else "vision_tower.")
    language = ("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")
    for ours, theirs in (tower, *language):
        if module.startswith(ours):
            return theirs + module.removeprefix(ours)
    return module.removeprefix("model.")


def assert_clients_skip_the_same_modules(family, artifact):
    skipped = json.loads((artifact / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    program = vlmbuild.load(artifact)[0].program
    found = {}
    for region in program.regions.values():
        quantized = {recipe.source for recipe in region.recipes}
        linear = {slot.name for slot in region.slots if len(slot.shape) == 2 and slot.name.endswith(".weight")}
        for instance in region.instances:
            names = {join(instance, name).removesuffix(".weight"): name in quantized for name in quantized | linear}
            found |= names
    assert set(found.values()) == {True, False}
    for module, quantized in found.items():
        if "embed" not in module:
            assert skips_in_vllm(vllm_name(family, module), skipped) != quantized, module
            assert should_convert_module(module, skipped) == quantized, module


def bitsandbytes_error(weight, form):
    """Norm of bitsandbytes' own rounding error of a weight; 0 for a tensor that is not a matrix."""
    if weight.ndim != 2:
        return 0.0
    if form == "int8":
        return (int8_vectorwise_dequant(*int8_vectorwise_quant(weight.half())[:2]) - weight).norm()
    packed, state = quantize_4bit(weight, quant_type=form, compress_statistics=True)
    return (dequantize_4bit(packed, state) - weight).norm()


def test_quantized_and_back(family, source, base, tmp_path):
    for form in FORMATS[family]:
        spec = QuantSpec(form, skip=("*.layers.1.mlp.down_proj",))
        built = build(base, tmp_path / form, Recipe(quantize=spec, dtype="float32"))
        assert_clients_skip_the_same_modules(family, built.path)
        back = build(built.path, tmp_path / f"{form} plain", Recipe(quantize=QuantSpec("none"), dtype="float32"))
        name = FAMILIES[family].module_name  # transformers writes newer names than published files have
        plain, original = (
            {name(key): tensor for key, tensor in load_file(path / "model.safetensors").items()}
            for path in (back.path, source)
        )
        assert plain.keys() == original.keys()
        for key, tensor in original.items():
            error = (plain[key] - tensor.float()).norm()
            assert error <= 1.01 * bitsandbytes_error(tensor.float(), form), key
        theirs, loading = AutoModelForImageTextToText.from_pretrained(built.path, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        model, processor = vlmbuild.load(built.path)
        found, expected = answer_logits(model, processor), answer_logits(dequantized(theirs), processor)
        assert_close(found, expected.float(), INT8 if form == "int8" else SAME_WEIGHTS_FP32, form)


def conversation(sample):
    content = [{"type": "text", "text": LARGEST.question}, {"type": "image", "image": sample.image}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": LARGEST.answer(sample.digits)}]}
    return {"messages": [{"role": "user", "content": content}, answer]}


def test_by_unsloths_names(family, source, tmp_path, monkeypatch):
    """A 4-bit model learns, and then answers what transformers' and PEFT's do with the same weights."""
    monkeypatch.setenv("VLMBUILD_CACHE", str(tmp_path / "cache"))
    model, processor = FastVisionModel.from_pretrained(source, load_in_4bit=True, dtype=torch.float32)
    FastVisionModel.get_peft_model(model, r=4)
    fill_adapter(model)
    FastVisionModel.for_training(model)
    samples = Digits("train", 1).take(2)
    batch = UnslothVisionDataCollator(model, processor)([conversation(sample) for sample in samples])
    loss = model(**batch).loss
    loss.backward()
    assert all(parameter.grad is not None for _, parameter in model.trainable_parameters())
    FastVisionModel.for_inference(model)
    model.save_pretrained(tmp_path / "adapter")
    theirs = dequantized(AutoModelForImageTextToText.from_pretrained(model.path, dtype=torch.float32))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_close(loss, theirs(**batch).loss, MODEL_FP32)
    texts, images = [prompt(processor, LARGEST)] * 2, [[sample.image] for sample in samples]
    asked = processor(
        text=texts, images=images, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    )
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**asked, **greedy), theirs.generate(**asked, **greedy))
