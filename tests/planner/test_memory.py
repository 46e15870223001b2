"""The memory that a plan names, against what torch's profiler sees allocated on this CPU, inside operators too."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import config_values, make_batch
from torch.profiler import ProfilerActivity, profile

from vlmbuild import add_lora, build, load, plan
from vlmbuild.builder.build import rewrite
from vlmbuild.capture.export import capture
from vlmbuild.capture.outline import outline
from vlmbuild.errors import UsageError
from vlmbuild.families import FAMILIES, ImageCost
from vlmbuild.planner.memory import Workload, estimate_memory
from vlmbuild.quant.decide import decide
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.runtime.torch.checkpointing import Checkpointing
from vlmbuild.runtime.torch.model import VisionLanguageModel

NF4 = QuantSpec()
MLLAMA = {
    "architectures": ["MllamaForConditionalGeneration"],
    "model_type": "mllama",
    "image_token_index": 320,
    "text_config": {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "cross_attention_layers": [1],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 96,
        "image_size": 28,
        "patch_size": 14,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 192,
    },
}
PIXTRAL = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 10,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": None,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "patch_size": 4,
        "image_size": 128,
        "hidden_act": "silu",
    },
}


def highest(run):
    """Most bytes that were allocated at once while `run` ran, after it has run once."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = top = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top


def measure(model, batch, labels, rank):
    """Measure inference, training, and training with checkpointing."""
    model.eval()
    with torch.no_grad():
        found = [highest(lambda: model(**batch))]
    add_lora(model, rank)
    for model.train().checkpointing in (None, Checkpointing()):
        found.append(highest(lambda: model(**batch, labels=labels).loss.backward()))
    return found


def holds(memory, found):
    named = [memory.infer_activations, memory.train_activations, memory.checkpointed_activations]
    off = [f"{100 * (mine / real - 1):+.1f} % of {real:,}" for mine, real in zip(named, found, strict=True)]
    assert all(math.isclose(mine, real, rel_tol=0.15) for mine, real in zip(named, found, strict=True)), off


def wide_qwen():
    """Three times 300 tokens, a wide MLP and a large vocabulary; two images of different sizes in each sample."""
    values = config_values()
    values["text_config"] |= {"intermediate_size": 2048, "vocab_size": 4000}
    grids = ((1, 8, 12), (1, 16, 4))
    batch, labels = make_batch([[100, *grids, 156]] * 3)
    return values, batch, labels, [ImageCost(96, 24), ImageCost(64, 16)]


def tiles():
    values, text = MLLAMA, 120
    ids = torch.randint(3, 300, (2, text + 1))
    ids[:, 2] = 320
    present = torch.tensor([1, 1, 0, 0])
    batch = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 1, 4, 3, 28, 28),
        "aspect_ratio_ids": torch.full((2, 1), 2),
        "aspect_ratio_mask": present.expand(2, 1, 4),
        "cross_attention_mask": ((torch.arange(text + 1) >= 2)[:, None, None] * present).expand(2, -1, 1, -1),
    }
    return values, batch, ids.masked_fill(ids == 320, -100), [ImageCost(4 * 8, 1, 4 * 5)]


def patches():
    rows, columns = 8, 10
    image = ([10] * columns + [12]) * (rows - 1) + [10] * columns + [13]
    ids = torch.tensor([[5, *image, *[30] * 63]] * 2)
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 40), "image_sizes": torch.tensor([(32, 40)] * 2)}
    return PIXTRAL, batch, ids.masked_fill(ids == 10, -100), [ImageCost(rows * columns, len(image))]


@pytest.mark.parametrize(
    ("family", "case", "text_tokens", "recipe"),
    [
        ("qwen2_vl", wide_qwen, 260, Recipe()),
        ("mllama", tiles, 120, Recipe(quantize=NF4)),
        ("pixtral", patches, 64, Recipe(quantize=NF4, attention="sdpa", dtype="float32")),
    ],
)
def test_memory_is_what_is_allocated(family, case, text_tokens, recipe):
    family, dtype = FAMILIES[family], getattr(torch, recipe.dtype)
    values, batch, labels, images = case()
    config = family.config(values)
    traces = {"image": capture(family, config, "image")}
    program = outline(family, family.geometry(config), family.ties(config), traces)
    rewrite(program, recipe, lambda: decide(program, recipe.quantize), lambda *_: None)
    tensors = {name: filled(slot) for name, slot in program.slots()}
    samples, tokens = batch["input_ids"].shape
    model = VisionLanguageModel(program, family, config, tensors, dtype)
    workload = Workload(samples, text_tokens, rank=8, device="cpu")
    memory = estimate_memory(copy.deepcopy(program), family, config, dtype, images, workload)
    assert memory.tokens == tokens
    assert memory.load == sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    holds(memory, measure(model, batch, labels, 8))
    assert memory.adapter == sum(parameter.nbytes for _, parameter in model.trainable_parameters())


def filled(slot):
    if slot.dtype == torch.uint8:
        return torch.randint(0, 256, slot.shape, dtype=torch.uint8)
    return torch.randn(slot.shape).mul(0.05).to(slot.dtype)


@pytest.fixture
def captured(monkeypatch, pristine_program):
    """Plans and builds of `checkpoint` take its program from here: capturing it is what takes time."""
    for module in ("planner.plan", "builder.build"):
        monkeypatch.setattr(f"vlmbuild.{module}.trace_program", lambda *_: copy.deepcopy(pristine_program))


@pytest.mark.usefixtures("captured")
def test_plan_is_what_is_built_loaded_and_run(checkpoint, tmp_path):
    recipe, workload = Recipe(quantize=NF4, dtype="float32"), Workload(3, 40, rank=4, device="cpu")
    planned = plan(checkpoint, recipe, images=[(112, 56)], workload=workload)
    artifact = build(checkpoint, tmp_path / "nf4", recipe)
    assert math.isclose(planned.weight_bytes, tensor_bytes(artifact), rel_tol=0.01)
    model, _ = load(artifact.path)
    assert planned.memory.load == sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    batch, labels = make_batch([[20, (1, 8, 4), 18]] * 3)
    model.processor = None  # its special tokens have other ids
    holds(planned.memory, measure(model, batch, labels, 4))


@pytest.mark.usefixtures("captured")
def test_plan_of_an_unquantized_build(checkpoint, tmp_path):
    planned = plan(checkpoint, Recipe(dtype="float32"))
    artifact = build(checkpoint, tmp_path / "plain", Recipe(dtype="float32"))
    assert math.isclose(planned.weight_bytes, tensor_bytes(artifact), rel_tol=0.01)
    memory = planned.memory
    assert memory.load == memory.infer - memory.infer_activations >= planned.weight_bytes
    assert (memory.images, memory.tokens) == (0, 256)
    document = planned.to_json()["memory"]
    state = document["adapter"] + document["gradients"] + document["optimizer"]
    assert document["train"] == document["load"] + state + document["train_activations"]
    assert document["infer"] < document["train_checkpointed"] < document["train"]


def tensor_bytes(artifact):
    """Count the bytes of model.safetensors without its header, which begins with its length and is not loaded."""
    with (artifact.path / "model.safetensors").open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return artifact.manifest.entry("model.safetensors").size - 8 - header


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch is 0.*positive.*--batch"),
        ({"text_tokens": -1}, "text_tokens is -1.*--text-tokens"),
        ({"rank": 0}, "rank is 0.*--rank"),
        ({"device": "tpu"}, "device cannot be 'tpu'.*cuda, cpu"),
    ],
)
def test_workloads_that_cannot_be(wrong, message):
    with pytest.raises(UsageError, match=message):
        Workload(**wrong)
