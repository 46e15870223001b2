"""Which layers lose most: errors on weights and on outputs, choices within a budget, and what they are worth."""

from __future__ import annotations

import json
import math

import pytest
import torch
from quantized import quantize
from tiny import FAMILY, make_batch

from vlmbuild.builder.build import build
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.checkpoint.source import ZOO
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.ir.linear_layers import LinearLayer, linear_layers
from vlmbuild.measure.calibration import conversation_batches, output_losses
from vlmbuild.measure.sensitivity import Loss, keep_within, weight_losses
from vlmbuild.ops.linear_4bit.dequantize import Packed4bit, dequantize_4bit
from vlmbuild.quant.bnb_state import parse_quant_state
from vlmbuild.quant.nf4 import NF4
from vlmbuild.quant.spec import Override, QuantSpec
from vlmbuild.recipe import Recipe

FORM = NF4()
BATCHES = [make_batch([[5, (1, 4, 6), 7, 3]])[0], make_batch([[5, 9, 8, 4, 7]])[0]]


@pytest.fixture(scope="module")
def family():
    return FAMILY


def quiet(*_):
    """Report no progress."""


@pytest.fixture(scope="module")
def source(checkpoint):
    return Checkpoint.open(checkpoint)


@pytest.fixture
def layers(built):
    return [layer for layer in linear_layers(built) if layer.role == "language" and not layer.shared]


def test_weight_losses_are_those_of_the_stored_bytes(layers, source):
    form = NF4(double_quant=False)
    losses = weight_losses(layers, form, source, torch.float32, quiet)
    assert [loss.layer for loss in losses] == layers
    for loss in losses:
        weight = source.weights.read(source.tensors[f"{loss.layer.module}.weight"].name).float()
        stored = quantize(weight, form)
        state = parse_quant_state(stored[".quant_state.bitsandbytes__nf4"])
        out_features, in_features = state.shape
        layout = (in_features, out_features, 64, "nf4", torch.float32)
        values = dequantize_4bit(Packed4bit(stored[""], stored[".absmax"], None, None, *layout))
        expected = (values - weight).double().norm() ** 2 / weight.double().norm() ** 2
        assert loss.error == pytest.approx(expected.item(), rel=1e-5)
        assert 1e-3 < loss.error < 2e-2


def test_output_losses_are_those_of_a_model_with_one_layer_quantized(built, layers, source, bind):
    losses = output_losses(layers, FORM, source, built, BATCHES, quiet)
    assert {loss.layer.module for loss in losses} == {layer.module for layer in layers}
    assert all(1e-8 < loss.error < 1e-1 for loss in losses)
    # The last layer's output goes through a norm into the head: hold its block's error against the model's own outputs.
    by_name = {loss.layer.module: loss.error for loss in losses}
    last = [name for name in by_name if ".layers.2." in name]
    model = bind(built).eval()
    found = {}
    for name in last:
        outputs = []
        for rounding in (False, True):
            held = model.get_parameter(f"{name}.weight").data
            if rounding:
                stored = quantize(held, NF4(double_quant=False))
                form = (held.shape[1], held.shape[0], 64, "nf4", torch.float32)
                rounded = dequantize_4bit(Packed4bit(stored[""], stored[".absmax"], None, None, *form))
                model.get_parameter(f"{name}.weight").data = rounded
            with torch.no_grad():
                outputs.append(torch.cat([model(**batch).logits.flatten(0, 1) for batch in BATCHES]))
            model.get_parameter(f"{name}.weight").data = held
        found[name] = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item() ** 2
    measured, actual = (
        sorted(values, key=values.__getitem__) for values in ({name: by_name[name] for name in last}, found)
    )
    assert measured[-1] == actual[-1]
    assert measured[0] in actual[:3]


def layer(name, shape):
    return LinearLayer(name, "language", shape)


def test_budget_is_spent_where_a_bit_saves_most_and_never_exceeded():
    losses = [
        Loss(layer("large", (512, 512)), 0.02),
        Loss(layer("small", (64, 512)), 0.01),
        Loss(layer("dull", (64, 512)), 1e-9),
    ]
    total = sum(math.prod(loss.layer.shape) for loss in losses)
    for budget in (4.2, 5.5, 7.0, 14.0, 16.0):
        chosen = keep_within(losses, FORM, budget, 16)
        bits = sum(
            form.bits(loss.layer.shape) if (form := chosen[loss.layer.module]) else 16 * math.prod(loss.layer.shape)
            for loss in losses
        )
        assert bits <= budget * total
    kept = {
        budget: {name for name, form in keep_within(losses, FORM, budget, 16).items() if form is None}
        for budget in (4.2, 5.5, 7.0, 16.0)
    }
    assert kept == {4.2: set(), 5.5: {"small"}, 7.0: {"small", "dull"}, 16.0: {"small", "large", "dull"}}


def test_budget_below_the_format_is_refused():
    with pytest.raises(UsageError, match=r"budget of 4.05 bits per weight cannot be met: nf4.* takes 4.1\d\d"):
        keep_within([Loss(layer("a", (512, 512)), 0.1)], FORM, 4.05, 16)


def test_no_batch_with_images_is_refused(built, source):
    layers = [layer for layer in linear_layers(built) if layer.role == "vision"]
    with pytest.raises(UsageError, match=r"No calibration batch runs through model.visual"):
        output_losses(layers, FORM, source, built, BATCHES[1:], quiet)


def test_nan_is_named(checkpoint, tmp_path):
    from checkpoints import copied, edit_weights

    source = copied(checkpoint, tmp_path / "source")
    edit_weights(source, lambda t: t["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(float("nan")))
    with pytest.raises(SourceError, match=r"layers.1.mlp.up_proj.weight holds NaN"):
        build(source, tmp_path / "out", Recipe(quantize=QuantSpec("auto", budget=6.0)))


def test_decisions_are_in_the_manifest_and_reproducible(checkpoint, tmp_path):
    recipe = Recipe(quantize=QuantSpec("auto", budget=6.0))
    one = build(checkpoint, tmp_path / "one", recipe, calibration=BATCHES)
    two = build(checkpoint, tmp_path / "two", recipe, calibration=BATCHES)
    assert one.manifest.id == two.manifest.id
    record = next(entry for entry in one.manifest.passes if entry["name"] == "quantize_linear")
    assert len(record["calibration"]) == 64
    language = [entry for entry in record["decisions"] if "language_model.layers" in entry["module"]]
    assert len(language) == 21
    assert all(float(entry["error"]) > 0 for entry in language)
    kept = {entry["module"] for entry in language if not entry["format"]}
    assert kept
    assert all(entry["reason"] == "sensitive, kept within the budget" for entry in language if entry["module"] in kept)


def test_a_pattern_of_the_users_is_stronger_than_a_measurement(checkpoint, tmp_path):
    spec = QuantSpec("auto", budget=16.0, overrides=(Override("*.o_proj", "nf4"),), skip=("*.q_proj",))
    built = build(checkpoint, tmp_path / "out", Recipe(quantize=spec))
    record = next(entry for entry in built.manifest.passes if entry["name"] == "quantize_linear")
    packed = {entry["module"].rpartition(".")[2] for entry in record["decisions"] if entry["format"]}
    assert record["calibration"] == ""
    assert packed == {"o_proj"}  # the budget allows to keep all others
    reasons = {entry["module"].rpartition(".")[2]: entry["reason"] for entry in record["decisions"]}
    assert reasons["q_proj"] == "in the skip list"


def test_conversations_from_a_file(tmp_path, checkpoint, family):
    from PIL import Image

    Image.new("RGB", (56, 84), (200, 30, 60)).save(tmp_path / "photo.png")
    content = [{"type": "image", "path": str(tmp_path / "photo.png")}, {"type": "text", "text": "What is it?"}]
    lines = [json.dumps({"messages": [{"role": "user", "content": content}]}), ""]
    file = tmp_path / "calibration.jsonl"
    file.write_text("\n".join(lines))
    processor = family.processor(ZOO["qwen2-vl-digits"])
    (batch,) = conversation_batches(file, processor)
    assert batch["pixel_values"].shape[0] == batch["image_grid_thw"].prod()
    file.write_text("\n")
    with pytest.raises(UsageError, match="holds no conversation"):
        conversation_batches(file, processor)
    file.write_text('{"messages": 5}\n')
    with pytest.raises(UsageError, match=r"calibration.jsonl, line 1 is not a conversation"):
        conversation_batches(file, processor)
    with pytest.raises(UsageError, match="cannot be read"):
        conversation_batches(tmp_path / "none", processor)
