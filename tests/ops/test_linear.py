"""oneDNN's linear layer: torch's values, for large float32 weights on a CPU and without gradients alone; and the packed one."""

import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from vlmbuild.ops.linear import embedding_packed, linear_onednn, linear_packed, suits_onednn
from vlmbuild.targets.aoti.compile import compile_region, platform_compiled_for
from vlmbuild.targets.aoti.lowering import lower

has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
LARGE = (512, 512)


@has_onednn
@pytest.mark.parametrize("shape", [(7, 512), (2, 3, 512), (1, 1, 512), (0, 512)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_are_those_of_torch(shape, with_bias):
    x, weight, bias = torch.randn(shape), torch.randn(LARGE), torch.randn(512) if with_bias else None
    torch.testing.assert_close(linear_onednn(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    torch.library.opcheck(torch.ops.vlmbuild.linear_onednn.default, (x, weight, bias))


@has_onednn
@pytest.mark.parametrize(
    ("states", "weight", "suits"),
    [
        (torch.randn(3, 512), torch.randn(LARGE), True),
        (torch.randn(3, 8), torch.randn(8, 8), False),
        (torch.randn(3, 512).bfloat16(), torch.randn(LARGE).bfloat16(), False),
        (torch.randn(3, 512, device="meta"), torch.randn(LARGE, device="meta"), False),
    ],
)
def test_what_it_is_for(states, weight, suits):
    assert suits_onednn(states, weight) is suits


@has_onednn
@pytest.mark.slow
def test_compiled_code_uses_it(tmp_path):
    """Weights are inputs of AOTInductor's code, and its C++ calls oneDNN."""
    graph = Graph()
    inputs = torch.randn(3, 512), torch.randn(LARGE), torch.randn(512)
    nodes = tuple(graph.placeholder(f"in{place}") for place in range(len(inputs)))
    graph.output((graph.call_function(torch.ops.aten.linear.default, nodes),))
    module = GraphModule(nn.Module(), graph)
    mode = FakeTensorMode()
    for node, value in zip(nodes, inputs, strict=True):
        node.meta["val"] = mode.from_tensor(value)
    lower(module)
    package = tmp_path / "layer.pt2"
    compile_region(module, package, platform_compiled_for().level)
    (found,) = torch._inductor.aoti_load_package(str(package)).loader.boxed_run(list(inputs))
    torch.testing.assert_close(found, F.linear(*inputs), rtol=1e-4, atol=1e-4)
    with zipfile.ZipFile(package) as files:
        code = b"".join(files.read(name) for name in files.namelist() if name.endswith(".so"))
    assert b"aoti_torch_cpu__linear_pointwise" in code


def test_a_packed_layer_is_a_linear_layer_on_the_values_that_are_stored():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    assert linear_packed(x, weight, bias, "int4").equal(F.linear(x, weight, bias))
    assert torch.ops.vlmbuild.linear_packed(x, weight, None, "int4").equal(F.linear(x, weight))
    assert torch.ops.vlmbuild.linear_packed(x.to("meta"), weight.to("meta"), None, "int4").shape == (2, 3, 5)


def test_embedding_packed_is_the_lookup():
    weight, ids = torch.randn(5, 8), torch.tensor([[4, 0, 4]])
    assert embedding_packed(weight, ids, "int4").equal(F.embedding(ids, weight))
    assert torch.ops.vlmbuild.embedding_packed(weight, ids, "int4").equal(F.embedding(ids, weight))
    assert torch.ops.vlmbuild.embedding_packed(weight.to("meta"), ids.to("meta"), "int4").shape == (1, 3, 8)
