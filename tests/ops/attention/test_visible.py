"""Where inductor compiles attention for a GPU it sees the kernels; other devices, exports and single rows keep the operator."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

pytest.importorskip("triton", reason="triton is Linux only")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.ops import tiles
from vlmbuild.ops.attention import triton as attention_triton

OPS = torch.ops.vlmbuild
KERNEL = torch.ops.higher_order.triton_kernel_wrapper_functional


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """What torch asks of a GPU to find out which tensors a kernel writes."""
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(driver, "_active", target)
    monkeypatch.setattr(attention_triton, "target_of", lambda tensor: 90)


class Inputs:
    """Of attention, without data, on any device; lengths that are not known."""

    def __init__(self, device, length=None, dtype=torch.bfloat16):
        self.env = ShapeEnv()
        length = self.size("length", 1013) if length is None else length
        with FakeTensorMode(shape_env=self.env):
            self.query, self.key, self.value = (
                torch.empty(1, length, heads, 128, device=device, dtype=dtype).transpose(1, 2) for heads in (12, 2, 2)
            )
            self.bounds = torch.empty(self.size("bounds", 6), device=device, dtype=torch.int32)
            self.masks = {kind: torch.empty(1, length, device=device, dtype=kind) for kind in (torch.bool, torch.int64)}
            self.groups = torch.empty(length, device=device, dtype=torch.int32)
            self.visible = torch.empty(length, self.size("groups", 37), device=device, dtype=torch.bool)

    def size(self, name, hint):
        source = ConstantSource(name)
        symbol = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        return self.env.create_symintnode(symbol, hint=hint, source=source)

    def trace(self, function, *masks):
        """Targets of the graph's nodes, and conditions on sizes."""
        graph = make_fx(dispatch_functionalize(function))(self.query, self.key, self.value, *masks)
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        return targets, [str(guard.expr) for guard in self.env.guards]


def packed(name, causal=True):
    def both(query, key, value, bounds):
        forward, backward = (getattr(OPS, f"{name}_{part}") for part in ("forward", "backward"))
        out, logsumexp = forward(query, key, value, None, bounds, None, None, causal, 0.1)
        return backward(out, query, key, value, None, bounds, None, None, out, logsumexp, causal, 0.1)

    return both


@pytest.fixture
def measured(monkeypatch):
    """Our kernels are the default."""
    monkeypatch.setattr(
        tiles, "runs_by_default", lambda kernel, tensor: tensor.is_cuda and tensor.dtype != torch.float64
    )


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("name", ["attention_triton", "attention_auto"])
def test_forward_and_backward_are_kernels_for_every_length(name):
    inputs = Inputs("cuda")
    targets, guards = inputs.trace(packed(name), inputs.bounds)
    assert targets.count(KERNEL) == 5  # ranges twice, and three of attention
    assert not [target for target in targets if "vlmbuild" in str(target)]
    assert guards == []


def test_groups_of_keys_keep_the_operator():
    inputs = Inputs("cuda")

    def grouped(query, key, value, groups, visible):
        return OPS.attention_auto(query, key, value, None, None, groups, visible, False, 0.1)

    targets, _ = inputs.trace(grouped, inputs.groups, inputs.visible)
    assert OPS.attention_auto_forward.default in targets


def test_kernels_that_are_not_measured_stay_hidden():
    inputs = Inputs("cuda")
    assert KERNEL not in inputs.trace(packed("attention_auto"), inputs.bounds)[0]


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_prompts_with_padding_are_kernels(dtype):
    inputs = Inputs("cuda")

    def masked(query, key, value, mask):
        return OPS.attention_auto(query, key, value, mask, None, None, None, True, 0.1)

    targets, guards = inputs.trace(masked, inputs.masks[dtype])
    assert (targets.count(KERNEL), guards) == (1, [])


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("device", "options"), [("cpu", {}), ("cuda", {"length": 1}), ("cuda", {"dtype": torch.float64})]
)
def test_elsewhere_the_operator_stays(device, options):
    inputs = Inputs(device, **options)
    targets, _ = inputs.trace(packed("attention_auto"), inputs.bounds)
    assert KERNEL not in targets
    assert {OPS.attention_auto_forward.default, OPS.attention_auto_backward.default} <= set(targets)


def test_compiled_graphs_are_cached_by_the_source_of_their_kernels():
    names = {kernel.__name__ for kernel in get_triton_kernels_for_op("vlmbuild::attention_auto")}
    assert names >= {"forward_kernel", "grad_query_kernel", "grad_key_kernel", "segments_kernel"}
