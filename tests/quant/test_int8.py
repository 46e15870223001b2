"""The 8-bit layout: bitsandbytes' own bytes, in a file that transformers opens, whatever the grouping of rows."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.artifact.weights_writer import WeightsWriter
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.ops.linear_8bit.op import linear_8bit
from vlmbuild.quant import int8
from vlmbuild.quant.int8 import Int8, dequantize_rows, quantize_rows

nn = pytest.importorskip("bitsandbytes.nn")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(3, 67), (1, 1), (200, 1024), (64, 3)]
SKIPPED = ["lm_head", "model.visual"]


def weight(shape, dtype=torch.bfloat16, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def library_state(values):
    """Return the state dict of bitsandbytes' layer with this weight."""
    layer = nn.Linear8bitLt(values.shape[1], values.shape[0], bias=False, has_fp16_weights=False)
    layer.weight.data = values.clone()
    return layer.to("cpu").state_dict(prefix="layer.")


def stored_tensors(values, module="layer"):
    parts = Int8().encode([values.flatten()], tuple(values.shape), values.dtype, "w")
    return {module + suffix: part for suffix, part in parts}


def equal(one, two):
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype, key
        assert torch.equal(tensor, two[key]), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bytes_as_the_library(shape, dtype):
    values = weight(shape, dtype)
    values[0, 0] = 1e-9  # nothing in float16
    values[-1, -1] = 300
    state = library_state(values)
    equal(stored_tensors(values), state)
    assert {spec.name: (spec.dtype, spec.shape) for spec in Int8().parts("layer", shape, dtype)} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()
    }


def test_rows_of_zeros_are_zeros():
    values = weight((5, 40))
    values[2] = 0
    values[4] = 1e-9  # and in float16 only
    equal(stored_tensors(values), library_state(values))
    quantized, scales = quantize_rows(values)
    assert not quantized[[2, 4]].any()
    assert scales[[2, 4]].tolist() == [0, 0]
    assert dequantize_rows(quantized, scales, torch.float32)[[2, 4]].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouping_does_not_show(dtype, monkeypatch):
    values = weight((200, 64), dtype)
    whole = quantize_rows(values)
    dense = dequantize_rows(*whole, dtype)
    monkeypatch.setattr(int8, "GROUP_VALUES", 64 * 7 + 3)
    assert all(map(torch.equal, quantize_rows(values), whole))
    assert torch.equal(dequantize_rows(*whole, dtype), dense)
    parts = [quantize_rows(part) for part in values.split([1, 90, 0, 109])]
    assert all(torch.equal(torch.cat(pieces), one) for pieces, one in zip(zip(*parts, strict=True), whole, strict=True))
    strided = values.T.contiguous().T
    assert all(map(torch.equal, quantize_rows(strided), whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantized_as_transformers_does(dtype):
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    values = weight((70, 64), dtype)
    layer = nn.Linear8bitLt(64, 70, bias=False, has_fp16_weights=False)
    layer.weight.data = values.clone()
    layer = layer.to("cpu")
    dense = dequantize_rows(*quantize_rows(values), dtype)
    assert torch.equal(dense, dequantize_bnb_weight(layer.weight, layer.state).to(dtype))
    step = values.float().abs().amax(1, keepdim=True) / 127
    rounding = max(torch.finfo(kind).eps for kind in (dtype, torch.float16)) * values.float().abs()
    assert ((dense.float() - values.float()).abs() <= 0.501 * step + rounding).all()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite(number, dtype):
    values = weight((9, 40), dtype)
    values[5, 3] = number
    with pytest.raises(SourceError, match=r"tensor a\.b\.weight holds NaN or infinity\. Repair"):
        quantize_rows(values, name="a.b.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beyond_float16(dtype):
    values = weight((9, 40), dtype)
    values[5, 3] = 65280
    assert torch.isfinite(quantize_rows(values)[1]).all()
    for number in (66048, -66048):
        values[5, 3] = number
        with pytest.raises(SourceError, match=r"tensor a\.b\.weight holds values beyond ±65504.*skip list"):
            quantize_rows(values, name="a.b.weight")


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5), (0, 4), (3, 0)])
def test_shapes_of_no_linear_layer(shape):
    with pytest.raises(UsageError, match=r"weight of a\.b has the shape .*skip list"):
        Int8().parts("a.b", shape, torch.float16)


def test_stored_scales_that_cannot_be_used():
    quantized, scales = quantize_rows(weight((3, 40)))
    for bad in (-scales, scales * float("nan")):
        with pytest.raises(SourceError, match=r"8-bit tensor w cannot be used: .*negative, NaN or infinity"):
            dequantize_rows(quantized, bad, torch.float32, name="w")


def test_through_the_writer(tmp_path):
    tensors = stored_tensors(weight((30, 40)), "a.b")
    with ArtifactWriter(tmp_path / "one") as writer:
        with WeightsWriter(writer, Int8().parts("a.b", (30, 40), torch.float16)) as stored:
            for name, tensor in tensors.items():
                stored.add(name, tensor)
        writer.publish(name="m", target="trainable")
    checkpoint = CheckpointWeights(tmp_path / "one")
    equal({name: checkpoint.read(name) for name in checkpoint.tensors}, tensors)
    equal(load_file(tmp_path / "one" / "model.safetensors"), tensors)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model that transformers quantizes itself, one that it opens with our tensors, and the stored tensors."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each call that inputs become float16
    source, ours = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("ours")
    tiny.make_reference(tiny.make_config(1, 1)).bfloat16().save_pretrained(source)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED, llm_int8_threshold=2.0)
    theirs = AutoModelForImageTextToText.from_pretrained(source, quantization_config=config).eval()
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        linear = module.endswith("_proj") and name.startswith("model.layers")
        tensors |= stored_tensors(tensor, module) if linear else {name: tensor}
    theirs.config.save_pretrained(ours)
    save_file(tensors, ours / "model.safetensors", {"format": "pt"})
    return theirs, AutoModelForImageTextToText.from_pretrained(ours).eval(), tensors


def batch(model):
    values, _ = tiny.make_batch(*tiny.BATCHES["two grids, left"])
    return {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in values.items()}


def test_same_checkpoint_as_transformers(models, tmp_path):
    theirs, ours, tensors = models
    theirs.save_pretrained(tmp_path)
    equal(load_file(tmp_path / "model.safetensors"), tensors)
    with torch.no_grad():
        assert torch.equal(ours(**batch(ours)).logits, theirs(**batch(theirs)).logits)
    assert ours.dtype == torch.bfloat16


def test_same_logits_with_the_operator(models, monkeypatch):
    theirs, ours, _ = models
    outliers = []

    def forward(layer, x):
        outliers.append(bool((x.abs() >= 2).any()))
        assert layer.state.threshold == 2.0
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        return linear_8bit(x, layer.weight.data, scales, layer.bias, 2.0)

    with torch.no_grad():
        expected = theirs(**batch(theirs)).logits
        monkeypatch.setattr(nn.Linear8bitLt, "forward", forward)
        assert torch.equal(ours(**batch(ours)).logits, expected)
    assert len(outliers) == 7  # of one layer
    assert any(outliers)
