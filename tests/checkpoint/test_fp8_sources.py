"""Checkpoints with 8-bit floating-point weights: they become the values that transformers dequantizes them to."""

from __future__ import annotations

import json

import matrix
import pytest
import torch
from checkpoints import copied, edit_config, edit_weights, write_tiny
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.builder.build import build
from vlmbuild.compat.unsloth_arguments import quantize_format
from vlmbuild.errors import SourceError
from vlmbuild.planner.plan import plan
from vlmbuild.quant.dequantized import dequantized_weights
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.recipe import Recipe

BLOCK = 64
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"


def quantized(weight, block):
    """A weight in float8 with its scales as published: one in bfloat16, or one in float32 for every block."""
    side = BLOCK if block else max(weight.shape)
    rows, columns = (-(-size // side) for size in weight.shape)
    blocks = weight.view(rows, weight.shape[0] // rows, columns, weight.shape[1] // columns)
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
    return values, scales if block else scales.to(torch.bfloat16).squeeze()


def announce(config, block):
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic" if block else "static",
        "weight_block_size": [BLOCK, BLOCK] if block else None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }


def quantize(tensors, block):
    """Replace the language model's linear weights, as in published checkpoints."""
    for name in [name for name in tensors if name.startswith("language_model.model.layers") and "_proj" in name]:
        module = name.removesuffix(".weight")
        tensors[name], tensors[f"{module}.weight_scale_inv"] = quantized(tensors[name].float(), block)
        if not block:
            tensors[f"{module}.activation_scale"] = torch.tensor(0.5, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny("mistral3", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module", params=[False, True], ids=["one scale", "blocks"])
def source(request, plain, tmp_path_factory):
    path = copied(plain, tmp_path_factory.mktemp("fp8") / "source")
    edit_config(path, lambda values: announce(values, request.param))
    edit_weights(path, lambda tensors: quantize(tensors, request.param))
    return path


def values_of(path):
    return load_file(path / "model.safetensors")


def test_values_are_those_that_transformers_dequantizes_to(source, tmp_path):
    """In bfloat16 the whole model's, in float32 those of its function: its model is bfloat16 whatever is asked for."""
    family = matrix.tiny("mistral3").family
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.bfloat16}
    theirs = AutoModelForImageTextToText.from_pretrained(source, **options).state_dict()
    built = build(source, tmp_path / "out", Recipe(dtype="bfloat16")).path
    ours = {family.module_name(name): tensor for name, tensor in values_of(built).items()}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert "quantization_config" not in json.loads((built / "config.json").read_text())
    stored, wide = values_of(source), values_of(build(source, tmp_path / "wide", Recipe(dtype="float32")).path)
    scaled = [name.removesuffix("_scale_inv") for name in stored if name.endswith("weight_scale_inv")]
    assert len(scaled) == 3 * 7
    for name in scaled:
        scales = stored[f"{name}_scale_inv"]
        assert torch.equal(wide[name], Fp8Dequantize(None)._dequantize_one(stored[name], scales, torch.float32)), name


@pytest.mark.parametrize("source", [True], indirect=True, ids=["blocks"])
def test_quantizing_again_and_measuring_start_from_the_dequantized_weights(source, tmp_path):
    whole = build(source, tmp_path / "whole", Recipe(dtype="bfloat16")).path
    for spec in (QuantSpec(), QuantSpec("auto", budget=6.0)):
        recipe = Recipe(dtype="bfloat16", quantize=spec)
        ours, theirs = (
            values_of(build(path, tmp_path / f"{spec.format} {path.name}", recipe).path) for path in (source, whole)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert any(tensor.dtype == torch.uint8 for tensor in ours.values())


def test_a_plan_needs_no_weights(source, tmp_path):
    path = copied(source, tmp_path / "config")
    (path / "model.safetensors").unlink()
    found, full = (plan(place, Recipe(quantize=QuantSpec(), dtype="bfloat16")) for place in (path, source))
    assert found.roles == full.roles
    # Unsloth's arguments treat it as an unquantized source.
    assert quantize_format(str(path), None, None, False, False) == "nf4"
    assert quantize_format(str(path), None, None, False, True) is None


@pytest.mark.parametrize("source", [True], indirect=True, ids=["blocks"])
def test_what_does_not_fit_is_named(source, tmp_path):
    scale = f"{Q_PROJ}.weight_scale_inv"
    for number, (change, message) in enumerate(
        (
            (
                lambda t: t.update({scale: t[scale][:1]}),
                rf"{scale} has shape \[1, 2\] for \[256, 128\] in blocks of \[64, 64\]",
            ),
            (lambda t: t.update({scale: -t[scale]}), f"scale in {scale} is negative"),
            (lambda t: t.update({scale: t[scale].to(torch.float8_e5m2)}), rf"{scale} .*torch.float8_e5m2"),
            (lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"].float()}), "not a matrix of float8_e4m3fn"),
            (lambda t: t.pop(scale), f"{Q_PROJ}.weight is torch.float8_e4m3fn"),
            (lambda t: [t.pop(name) for name in list(t) if "scale" in name], "no weight is quantized"),
        )
    ):
        path = copied(source, tmp_path / str(number))
        edit_weights(path, change)
        with pytest.raises(SourceError, match=message):
            build(path, tmp_path / "out", Recipe(dtype="float32"))


def test_other_methods_stay_refused(plain, tmp_path):
    for number, method in enumerate(("hqq", "fbgemm_fp8", ["fp8"])):
        path = copied(plain, tmp_path / str(number))
        edit_config(path, lambda values, m=method: values.update(quantization_config={"quant_method": m}))
        with pytest.raises(SourceError, match="quantized with .*bitsandbytes, fp8"):
            build(path, tmp_path / "out")


def test_one_scale_by_its_other_name(plain, tmp_path):
    """AutoFP8 wrote `weight_scale` and `input_scale`."""
    path, names = (
        copied(plain, tmp_path / "source"),
        {".weight_scale_inv": ".weight_scale", ".activation_scale": ".input_scale"},
    )
    edit_config(path, lambda values: announce(values, False))
    edit_weights(path, lambda tensors: quantize(tensors, False))
    expected = _dequantized(path)

    def rename(tensors):
        for old, new in names.items():
            for name in [name for name in tensors if name.endswith(old)]:
                tensors[name.removesuffix(old) + new] = tensors.pop(name)

    edit_weights(path, rename)
    found = _dequantized(path)
    assert expected.keys() == found.keys() and expected
    assert all(torch.equal(found[module], values) for module, values in expected.items())


def _dequantized(path):
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    return {
        weight.module: torch.cat(list(weight.values(1000)))
        for weight in dequantized_weights(CheckpointWeights(path), config)
    }
