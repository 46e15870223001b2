"""Rotary tables and rotation: bit-equal to transformers, gradients, compiler contract, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from vlmbuild.errors import UsageError
from vlmbuild.ops.rope.op import mrope_cos_sin, mrope_rotate, rotate_cpu, rotate_reference


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def pair(layout: str, dim: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, cos and sin, as models make them: transposed views, or slices of one fused projection."""
    angle = torch.randn(2, 7, dim // 2)
    if layout == "packed":
        fused = torch.randn(14, 3, 4, dim)
        return fused[:, 0], fused[:, 1], angle.flatten(0, 1).cos(), angle.flatten(0, 1).sin()
    query, key = torch.randn(2, 7, 4, dim).transpose(1, 2), torch.randn(2, 7, 2, dim).transpose(1, 2)
    return query, key, angle.cos(), angle.sin()


def test_tables_equal_transformers_text() -> None:
    from transformers import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    module = Qwen2VLRotaryEmbedding(
        Qwen2VLTextConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope)
    )
    position_ids = torch.stack([torch.randint(0, high, (2, 9)) for high in (30, 5000, 40000)])
    cos, sin = mrope_cos_sin(position_ids, module.inv_freq, [4, 6, 6], False, module.attention_scaling)
    expected_cos, expected_sin = module(torch.zeros(1), position_ids)
    assert torch.equal(torch.cat((cos, cos), -1), expected_cos)
    assert torch.equal(torch.cat((sin, sin), -1), expected_sin)


@pytest.mark.parametrize("sections", [[24, 20, 20], [6, 5, 5], [8, 4, 4]])
def test_interleaved_tables_equal_transformers_text(sections: list[int]) -> None:
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections}
    module = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=2 * sum(sections), rope_parameters=rope))
    position_ids = torch.stack([torch.randint(0, high, (2, 9)) for high in (30, 5000, 40000)])
    cos, sin = mrope_cos_sin(position_ids, module.inv_freq, sections, False, module.attention_scaling, True)
    expected_cos, expected_sin = module(torch.zeros(1), position_ids)
    assert torch.equal(torch.cat((cos, cos), -1), expected_cos)
    assert torch.equal(torch.cat((sin, sin), -1), expected_sin)


def test_tables_equal_transformers_vision() -> None:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding

    module = Qwen2VLVisionRotaryEmbedding(Qwen2VLVisionConfig(embed_dim=160, num_heads=2))
    position_ids = torch.stack([torch.randint(0, high, (11,)) for high in (9, 120)])
    cos, sin = mrope_cos_sin(position_ids, module.inv_freq, [20, 20], True, module.attention_scaling)
    # The model's module takes one axis of positions per row of a batch.
    expected_cos, expected_sin = module(torch.zeros(1), position_ids.t())
    assert torch.equal(torch.cat((cos, cos), -1), expected_cos)
    assert torch.equal(torch.cat((sin, sin), -1), expected_sin)


def test_tables_scale_and_carry_no_gradient() -> None:
    inv_freq = torch.rand(5, requires_grad=True)
    cos, sin = mrope_cos_sin(torch.randint(0, 9, (2, 3)), inv_freq, [2, 3], False, 0.5)
    assert cos.shape == sin.shape == (3, 5)
    assert not cos.requires_grad
    assert cos.abs().max() <= 0.5
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((3, 5), 0.25))


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("rotate", [mrope_rotate, rotate_cpu, rotate_reference])
def test_rotation_is_bit_equal_to_the_model_in_float32(layout: str, rotate) -> None:  # type: ignore[no-untyped-def]
    query, key, cos, sin = pair(layout)
    full_cos, full_sin = torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((sin, sin), -1).unsqueeze(1)
    for actual, x in zip(rotate(query, key, cos, sin), (query, key), strict=True):
        assert torch.equal(actual, x * full_cos + rotate_half(x) * full_sin)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_in_half_precision_rounds_once(layout: str, dtype: torch.dtype) -> None:
    query, key, cos, sin = pair(layout)
    actual = mrope_rotate(query.to(dtype), key.to(dtype), cos, sin)
    expected = mrope_rotate(query.to(dtype).float(), key.to(dtype).float(), cos, sin)
    for have, want in zip(actual, expected, strict=True):
        assert torch.equal(have, want.to(dtype))


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_rotation_gradients_and_saved_tensors(layout: str) -> None:
    query, key, cos, sin = pair(layout)
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    saved: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out_query, out_key = mrope_rotate(query, key, cos, sin)
    assert {x.data_ptr() for x in saved} == {cos.data_ptr(), sin.data_ptr()}
    weights = torch.randn_like(out_query), torch.randn_like(out_key)
    actual = torch.autograd.grad((out_query * weights[0]).sum() + (out_key * weights[1]).sum(), (query, key))
    plain = rotate_reference(query, key, cos, sin)
    expected = torch.autograd.grad((plain[0] * weights[0]).sum() + (plain[1] * weights[1]).sum(), (query, key))
    for have, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(have, want, atol=1e-6, rtol=0)


def test_rotation_with_a_frozen_key() -> None:
    query, key, cos, sin = pair("dense")
    query.requires_grad_()
    mrope_rotate(query, key, cos, sin)[0].sum().backward()
    assert query.grad is not None


@given(heads=st.integers(1, 3), length=st.integers(0, 5), half=st.integers(1, 9), turns=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_rotation_keeps_lengths_whatever_the_layout(heads: int, length: int, half: int, turns: int) -> None:
    query = torch.randn(2, heads, length, 2 * half).movedim(1, turns).contiguous().movedim(turns, 1)
    angle = torch.randn(2, length, half)
    out, _ = mrope_rotate(query, query, angle.cos(), angle.sin())
    torch.testing.assert_close(out.norm(dim=-1), query.norm(dim=-1))


def test_opcheck() -> None:
    position_ids, inv_freq = torch.randint(0, 99, (3, 2, 7)), torch.rand(10)
    for turns in ((), (True,)):
        opcheck(torch.ops.vlmbuild.mrope_cos_sin.default, (position_ids, inv_freq, [4, 3, 3], False, 1.0, *turns))
    for layout in ("dense", "packed"):
        query, key, cos, sin = pair(layout)
        arguments = (query.detach().requires_grad_(), key.detach().requires_grad_(), cos, sin)
        opcheck(torch.ops.vlmbuild.mrope_rotate.default, arguments)


def step(query, key, position_ids, inv_freq):  # type: ignore[no-untyped-def]
    cos, sin = torch.ops.vlmbuild.mrope_cos_sin(position_ids, inv_freq, [2, 3, 5], False, 1.0)
    query, key = torch.ops.vlmbuild.mrope_rotate(query, key, cos, sin)
    return query.square().sum() + key.sum()


def test_compiles_once_for_all_shapes_with_gradients() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, dynamic=True, fullgraph=True)
    inv_freq = torch.rand(10)
    for batch, length in ((5, 7), (6, 11), (9, 8)):
        query = torch.randn(batch, length, 4, 20).transpose(1, 2).requires_grad_()
        key = torch.randn(batch, length, 2, 20).transpose(1, 2).requires_grad_()
        arguments = (query, key, torch.randint(0, 99, (3, batch, length)), inv_freq)
        actual = torch.autograd.grad(compiled(*arguments), (query, key))
        for have, want in zip(actual, torch.autograd.grad(step(*arguments), (query, key)), strict=True):
            torch.testing.assert_close(have, want)
    assert counter.frame_count == 1


def test_exports_on_meta_with_symbolic_sizes() -> None:
    class Model(torch.nn.Module):
        def forward(self, query, key, position_ids, inv_freq):  # type: ignore[no-untyped-def]
            return step(query, key, position_ids, inv_freq)

    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=4096)
    example = (
        torch.empty(5, 4, 7, 20, device="meta"),
        torch.empty(5, 2, 7, 20, device="meta"),
        torch.empty(3, 5, 7, dtype=torch.long, device="meta"),
        torch.empty(10, device="meta"),
    )
    sizes = ({0: batch, 2: length}, {0: batch, 2: length}, {1: batch, 2: length}, None)
    program = torch.export.export(Model(), example, dynamic_shapes=sizes)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"vlmbuild.mrope_cos_sin.default", "vlmbuild.mrope_rotate.default"} <= names


def test_errors_say_what_does_not_fit() -> None:
    ids, inv_freq = torch.zeros(3, 2, 4, dtype=torch.long), torch.rand(10)
    with pytest.raises(UsageError, match="one section per position axis"):
        mrope_cos_sin(ids, inv_freq, [5, 5], False, 1.0)
    with pytest.raises(UsageError, match="sum must be its length"):
        mrope_cos_sin(ids, inv_freq, [4, 4, 4], False, 1.0)
    with pytest.raises(UsageError, match="each have its length"):
        mrope_cos_sin(ids, inv_freq, [10, 10, 9], True, 1.0)
    for sections in ([3, 4, 3], [2, 4, 4]):
        with pytest.raises(UsageError, match="cannot take turns in 10 lanes"):
            mrope_cos_sin(ids, inv_freq, sections, False, 1.0, True)
    query, key, cos, sin = pair("dense")
    with pytest.raises(UsageError, match=r"query of shape .* does not fit cos"):
        mrope_rotate(query, key, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    with pytest.raises(UsageError, match="key of shape"):
        mrope_rotate(query, key[:, :, 1:], cos, sin)
    with pytest.raises(UsageError, match="is odd"):
        mrope_rotate(query[..., 1:], key[..., 1:], cos[..., 1:], sin[..., 1:])
