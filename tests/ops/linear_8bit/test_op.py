"""The 8-bit linear layer against real bitsandbytes: bits, gradients, what autograd keeps, errors."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from vlmbuild.errors import UsageError
from vlmbuild.ops import WORKSPACES
from vlmbuild.ops.linear_8bit.op import GROUP_VALUES, dequantize_8bit, linear_8bit, linear_8bit_backward

nn = pytest.importorskip("bitsandbytes.nn")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 64), (5, 64), (2, 5, 64), (1, 1, 64), (2, 0, 64), (0, 64))


def layer(threshold: float = 6.0, biased: bool = True, dtype: torch.dtype = torch.float32, size=(64, 24)):  # type: ignore[no-untyped-def]
    """Make bitsandbytes' layer in evaluation mode, with the operator's arguments after its input."""
    module = nn.Linear8bitLt(*size, bias=biased, has_fp16_weights=False, threshold=threshold).eval()
    module.weight.data = torch.randn(size[1], size[0]).mul(0.2).to(dtype)
    module = module.to("cpu")
    bias = module.bias.detach().clone() if biased else None
    return module, (module.weight.data.clone(), module.weight.SCB.clone(), bias, threshold)


def features(shape: tuple[int, ...], dtype: torch.dtype, outliers: bool = True) -> torch.Tensor:
    """Inputs below 6, but for one whole column and single values of others."""
    x = torch.randn(shape).clamp(-4, 4)
    if outliers and x.numel():
        x[..., 7] *= 40
        x.view(-1, shape[-1])[-1, 20] = -11.5
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_bit_identical_to_bitsandbytes(dtype: torch.dtype, threshold: float, outliers: bool, biased: bool) -> None:
    module, arguments = layer(threshold, biased)
    for shape in SHAPES:
        x = features(shape, dtype, outliers)
        before = x.clone()
        actual = linear_8bit(x, *arguments)
        assert torch.equal(x, before)
        expected = module(x)
        assert actual.dtype == expected.dtype == dtype
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected), shape


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (130, 67), (1000, 33)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    for threshold in (0.0, 2.0):
        module, arguments = layer(threshold, size=size)
        x = torch.randn(7, size[0], dtype=torch.bfloat16)
        assert torch.equal(linear_8bit(x, *arguments), module(x))


def test_outliers_are_not_quantized() -> None:
    """Without a threshold, one large column takes the precision of all others."""
    module, (weight, scales, _, _) = layer(biased=False)
    x = features((50, 64), torch.float32)
    exact = x @ dequantize_8bit(weight, scales, torch.float32).T
    error = [(linear_8bit(x, weight, scales, None, threshold) - exact).abs().mean() for threshold in (0.0, 6.0)]
    assert error[1] < error[0] / 5
    beyond_float16 = x.clone()
    beyond_float16[:, 7] = 1e6
    actual = linear_8bit(beyond_float16, weight, scales, None, 6.0)
    assert torch.isfinite(actual).all()
    assert torch.equal(actual, module(beyond_float16))


def test_rows_share_their_outlier_columns() -> None:
    _, (weight, scales, bias, _) = layer()
    x = features((5, 64), torch.float32)
    for threshold, alone in ((0.0, True), (6.0, False)):
        together = linear_8bit(x, weight, scales, bias, threshold)
        single = torch.cat([linear_8bit(row[None], weight, scales, bias, threshold) for row in x])
        assert torch.equal(together, single) == alone


def test_any_number_of_dimensions_and_strides() -> None:
    _, arguments = layer()
    x = features((6, 64), torch.bfloat16)
    expected = linear_8bit(x, *arguments)
    assert torch.equal(linear_8bit(x.view(1, 2, 3, 64), *arguments), expected.view(1, 2, 3, 24))
    assert torch.equal(linear_8bit(x.T.contiguous().T, *arguments), expected)
    assert torch.equal(linear_8bit(x[:1].expand(4, 64), *arguments), linear_8bit(x[:1].repeat(4, 1), *arguments))
    assert torch.equal(linear_8bit(x[0], *arguments), linear_8bit(x[:1], *arguments)[0])
    strided = arguments[0].T.contiguous().T
    assert torch.equal(linear_8bit(x, strided, *arguments[1:]), expected)


def test_zero_rows_of_input_and_weight() -> None:
    module, (weight, scales, bias, threshold) = layer()
    weight[3], scales[3] = 0, 0
    module.weight.CB[3], module.weight.SCB[3] = 0, 0
    x = features((4, 64), torch.float32)
    x[2] = 0
    actual = linear_8bit(x, weight, scales, bias, threshold)
    assert torch.equal(actual, module(x))
    assert torch.equal(actual[2], bias)
    assert (actual[:, 3] == bias[3]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64)])
def test_gradients_of_bitsandbytes(dtype: torch.dtype, threshold: float, shape: tuple[int, ...]) -> None:
    module, (weight, scales, bias, _) = layer(threshold)
    module.bias.requires_grad_()
    module.bias.data = module.bias.data.to(dtype)  # the layer does so itself, which would lose the gradient's leaf
    bias = bias.to(dtype).requires_grad_()
    one, two = (features(shape, dtype).requires_grad_() for _ in range(2))
    two.data.copy_(one.data)
    actual, expected = linear_8bit(one, weight, scales, bias, threshold), module(two)
    seed = torch.randn(actual.shape).to(dtype)
    have = torch.autograd.grad(actual, (one, bias), seed)
    want = torch.autograd.grad(expected, (two, module.bias), seed)
    assert torch.equal(have[0], want[0])
    # Three dimensions are summed in two steps there, and rounded after each.
    tolerance = 0.0 if len(shape) == 2 else 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(have[1], want[1], atol=tolerance, rtol=tolerance)


def test_training_mode_has_the_same_gradient() -> None:
    module, arguments = layer()
    x = features((5, 64), torch.bfloat16).requires_grad_()
    seed = torch.randn(5, 24, dtype=torch.bfloat16)
    (have,) = torch.autograd.grad(linear_8bit(x, *arguments), x, seed)
    (want,) = torch.autograd.grad(module.train()(x), x, seed)
    assert torch.equal(have, want)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64), (2, 0, 64)])
def test_gradients_of_the_dequantized_product(shape: tuple[int, ...]) -> None:
    _, (weight, scales, bias, threshold) = layer()
    dense = weight.double() * scales.double()[:, None] / 127
    x, bias = features(shape, torch.float32).requires_grad_(), bias.requires_grad_()
    actual = linear_8bit(x, weight, scales, bias, threshold)
    seed = torch.randn_like(actual)
    have = torch.autograd.grad(actual, (x, bias), seed)
    assert have[0].shape == x.shape
    torch.testing.assert_close(have[0], (seed.double() @ dense).float())
    torch.testing.assert_close(have[1], seed.reshape(-1, 24).sum(0))
    half = linear_8bit(x.bfloat16(), weight, scales, bias, threshold)
    (grad,) = torch.autograd.grad(half.float().sum(), bias)
    assert grad.dtype == torch.float32


def test_dequantization_does_not_depend_on_its_groups() -> None:
    rows = 3 * GROUP_VALUES // 1000
    weight, scales = torch.randint(-127, 128, (rows, 1000), dtype=torch.int8), torch.rand(rows) + 0.01
    for dtype in DTYPES:
        whole = weight.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
        assert torch.equal(dequantize_8bit(weight, scales, dtype), whole)


def test_autograd_keeps_int8_only() -> None:
    _, arguments = layer()
    saved: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = linear_8bit(torch.randn(5, 64, requires_grad=True), *arguments)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in arguments[:2]}
    assert not [x for x in vars(out.grad_fn).values() if isinstance(x, torch.Tensor)]


def test_compiled_graph_keeps_int8_only() -> None:
    _, arguments = layer()
    saved: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    compiled = torch.compile(lambda x: linear_8bit(x, *arguments), backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        compiled(torch.randn(5, 64, requires_grad=True)).sum().backward()
    assert saved
    assert all(x.dtype == torch.int8 or x.numel() < arguments[0].numel() for x in saved)


def test_opcheck() -> None:
    _, (weight, scales, bias, _) = layer()
    bias = bias.requires_grad_()
    for threshold in (0.0, 6.0):
        x = features((2, 5, 64), torch.float32).requires_grad_()
        opcheck(torch.ops.vlmbuild.linear_8bit.default, (x, weight, scales, bias, threshold))
        opcheck(torch.ops.vlmbuild.linear_8bit.default, (x.detach().half(), weight, scales, None, threshold))
    opcheck(torch.ops.vlmbuild.linear_8bit_backward.default, (torch.randn(2, 5, 24), weight, scales))


def test_compiles_once_for_all_shapes_with_gradients() -> None:
    _, (weight, scales, bias, _) = layer()
    counter = CompileCounterWithBackend("aot_eager")

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.vlmbuild.linear_8bit(x, weight, scales, bias, 6.0).sin().sum()

    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for batch, length in ((2, 5), (3, 9), (7, 4)):
        x = features((batch, length, 64), torch.float32).requires_grad_()
        (actual,) = torch.autograd.grad(compiled(x), x)
        (expected,) = torch.autograd.grad(model(x), x)
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_checkpointing_and_inference_mode() -> None:
    _, arguments = layer()
    x = features((2, 5, 64), torch.bfloat16).requires_grad_()
    expected = linear_8bit(x, *arguments)
    (want,) = torch.autograd.grad(expected.float().sin().sum(), x)
    again = checkpoint(linear_8bit, x, *arguments, use_reentrant=False)
    (have,) = torch.autograd.grad(again.float().sin().sum(), x)
    assert torch.equal(have, want)
    with torch.inference_mode():
        assert torch.equal(linear_8bit(x, *arguments), expected)


def test_exports_on_meta_with_symbolic_sizes() -> None:
    _, (weight, scales, bias, threshold) = layer()

    class Model(torch.nn.Module):
        def forward(self, x, weight, scales, bias):  # type: ignore[no-untyped-def]
            return torch.ops.vlmbuild.linear_8bit(x, weight, scales, bias, threshold)

    example = (torch.empty(3, 5, 64, device="meta"), *(x.to("meta") for x in (weight, scales, bias)))
    sizes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=4096)}, None, None, None)
    program = torch.export.export(Model(), example, dynamic_shapes=sizes)
    (call,) = [node for node in program.graph.nodes if node.op == "call_function"]
    assert str(call.target) == "vlmbuild.linear_8bit.default"
    assert call.meta["val"].shape[2] == 24


def peak_bytes(function, *arguments):  # type: ignore[no-untyped-def]
    """Return the most bytes that a call allocates at once, and its result."""
    function(*arguments)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function(*arguments)
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1024, 128), (256, 1024)])
def test_workspace_covers_what_a_cpu_allocates(dtype: torch.dtype, size: tuple[int, int]) -> None:
    _, (weight, scales, _, threshold) = layer(size=size)
    x, grad = features((300, size[0]), dtype), torch.randn(300, size[1]).to(dtype)
    for function, arguments in (
        (torch.ops.vlmbuild.linear_8bit.default, (x, weight, scales, None, threshold)),
        (torch.ops.vlmbuild.linear_8bit_backward.default, (grad, weight, scales)),
    ):
        peak, result = peak_bytes(function, *arguments)
        said = WORKSPACES[function](arguments, result, "cpu") + result.nbytes
        assert peak < 1.02 * said  # small vectors, such as indices of outliers, are not in it
        assert said < 2 * peak


def test_errors_say_what_does_not_fit() -> None:
    _, (weight, scales, bias, _) = layer()
    x = torch.randn(2, 64)
    for bad, message in (
        ((torch.randn(2, 63), weight, scales, None), r"wanted \[..., 64\]"),
        ((x.long(), weight, scales, None), "16- or 32-bit float"),
        ((x.double(), weight, scales, None), "16- or 32-bit float"),
        ((x, weight, scales, bias[1:]), r"bias of shape \(23,\) .*; wanted \[24\]"),
        ((x, weight, scales, bias.double()), "bias of .* torch.float64"),
        ((x, weight.to(torch.uint8), scales, None), r"weight of .* torch.uint8; wanted \[out, in\] of torch.int8"),
        ((x, weight.flatten(), scales, None), r"weight of shape \(1536,\)"),
        ((x, weight[:0], scales[:0], None), "not empty"),
        ((x, weight, scales[1:], None), r"scales of shape \(23,\)"),
        ((x, weight, scales[:, None], None), r"scales of shape \(24, 1\)"),
        ((x, weight, scales.half(), None), "scales of .* torch.float16"),
    ):
        for device in ("cpu", "meta"):
            with pytest.raises(UsageError, match=message):
                linear_8bit(*(None if t is None else t.to(device) for t in bad), 6.0)
    for threshold in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="wanted 0, for no outlier columns"):
            linear_8bit(x, weight, scales, None, threshold)
    for device in ("cpu", "meta"):
        with pytest.raises(UsageError, match="scales of shape"):
            linear_8bit_backward(torch.randn(2, 24, device=device), weight.to(device), scales[1:].to(device))
