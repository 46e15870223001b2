import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from vlmbuild.errors import UsageError
from vlmbuild.formats import PackedWeight
from vlmbuild.ops.linear_4bit.dequantize import Packed4bit, dequantize_reference
from vlmbuild.quant.bnb_quantize import quantize_blocks
from vlmbuild.quant.int4 import Int4
from vlmbuild.quant.int8 import Int8, dequantize_rows, pack_onnx, quantize_rows
from vlmbuild.quant.nf4 import FP4, NF4
from vlmbuild.quant.ort_matmul import EXACT, unpacked

ROWS = 24


def product(weight, parts, x):
    """Multiply by a packed weight in ONNX Runtime."""
    names = [f"w{suffix}" for suffix in weight.parts]
    node = helper.make_node(weight.operator, ["x", *names], ["y"], domain="com.microsoft", **weight.attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", 1, [None, weight.attributes["K"]])],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(parts[s].numpy().reshape(p.shape), f"w{s}") for s, p in weight.parts.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("columns", [64, 128, 200])  # the last with a block that is not full, and an odd number of them
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("blocksize", "symmetric"), [(32, True), (32, False), (64, True), (64, False)])
def test_int4_is_what_onnxruntime_multiplies_by(blocksize, symmetric, exact, columns):
    form = Int4(blocksize, symmetric, exact)
    values, x = torch.randn(ROWS, columns), torch.randn(5, columns)
    weight = form.onnx_weight((ROWS, columns), torch.float32, "w")
    parts = form.pack(values, torch.float32)
    for suffix, part in weight.parts.items():
        assert parts[suffix].numel() == np.prod(part.shape)
        assert parts[suffix].dtype == part.dtype
    rounded = unpacked(weight, parts)
    found = product(weight, parts, x)
    error = float((found - x @ rounded.T).norm() / (x @ rounded.T).norm())
    assert error < 1e-5 if form.exact_inputs else 1e-3 < error < 2e-2
    assert 0.05 < float((rounded - values).norm() / values.norm()) < 0.12


def test_int4_asymmetric_loses_less_on_values_of_one_sign():
    values = torch.rand(ROWS, 128) + 0.5
    lost = [
        float(
            (
                unpacked(form.onnx_weight((ROWS, 128), torch.float32, "w"), form.pack(values, torch.float32)) - values
            ).norm()
        )
        for form in (Int4(32), Int4(32, False))
    ]
    assert lost[1] < lost[0]


def test_int4_extremes():
    values = torch.zeros(2, 64)
    values[1, 0], values[1, 40] = -3.0, 1e-30
    for form in (Int4(32), Int4(32, False)):
        rounded = unpacked(form.onnx_weight((2, 64), torch.float32, "w"), form.pack(values, torch.float32))
        assert torch.isfinite(rounded).all()
        assert rounded[0].eq(0).all()
        assert rounded[1, 0] == pytest.approx(-3.0, rel=1e-6)


def test_int8_keeps_the_values_of_bitsandbytes():
    values, x = torch.randn(ROWS, 96), torch.randn(5, 96)
    codes, scales = quantize_rows(values)
    weight = Int8().onnx_weight((ROWS, 96), torch.float32, "w")
    parts = pack_onnx(codes, scales, torch.float32)
    exact = dequantize_rows(codes, scales, torch.float32, name="w")
    torch.testing.assert_close(unpacked(weight, parts), exact, rtol=1e-6, atol=0)
    exact_product = product(
        PackedWeight(weight.operator, {**weight.attributes, "accuracy_level": EXACT}, weight.parts), parts, x
    )
    torch.testing.assert_close(exact_product, x @ exact.T, rtol=1e-5, atol=1e-5)
    rounded_inputs = product(weight, parts, x)
    assert float((rounded_inputs - x @ exact.T).norm() / (x @ exact.T).norm()) < 2e-2


@pytest.mark.parametrize("form", [NF4(), FP4()], ids=str)
def test_bitsandbytes_bytes_are_read_as_they_are(form):
    values, x = torch.randn(ROWS, 128), torch.randn(5, 128)
    packed, absmax = quantize_blocks(values.flatten(), quant_type=form.name, blocksize=64)
    weight = form.onnx_weight((ROWS, 128), torch.float32, "w")
    exact = dequantize_reference(Packed4bit(packed, absmax, None, None, 128, ROWS, 64, form.name, torch.float32))
    parts = {"": packed, "_absmax": absmax}
    assert unpacked(weight, parts).equal(exact)
    torch.testing.assert_close(product(weight, parts, x), x @ exact.T, rtol=1e-5, atol=1e-5)


def test_a_block_that_does_not_divide_a_row_is_refused():
    with pytest.raises(UsageError, match=r"layers\.0\.up.*100 columns.*int4"):
        NF4().onnx_weight((ROWS, 100), torch.float32, "layers.0.up")
