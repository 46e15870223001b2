import numpy as np
import onnxruntime
import pytest
import torch
from exactness import lookahead

from vlmbuild.errors import PassError
from vlmbuild.ops.attention.op import attention_reference, flat
from vlmbuild.targets.onnx.attention import ROWS, attention
from vlmbuild.targets.onnx.graph_builder import GraphBuilder
from vlmbuild.targets.onnx.translate import Site, Value

HEADS, DIM, SCALE = 4, 8, 0.3
reference = flat(attention_reference)


def run(arguments, causal, dtype=torch.float32, lookahead=None, window=None):
    """Run the translated operator on tensors; None is an argument that is left out."""
    names = ["query", "key", "value", "key_mask", "cu_seqlens", "key_groups", "visible_groups", "lookahead"]
    arguments = (*arguments, lookahead)
    builder = GraphBuilder(dtype)
    values = []
    for name, tensor in zip(names, arguments, strict=True):
        if tensor is not None:
            shape = [
                tensor.shape[1] if axis == 1 and tensor.ndim == 4 else f"{name}{axis}" for axis in range(tensor.ndim)
            ]
            builder.take_input(name, tensor.dtype, shape)
        values.append(None if tensor is None else Value(name, tensor))
    result = attention(Site(builder, None), *values[:-1], causal, SCALE, values[-1], window)
    builder.give_output("out", result, dtype, [None] * 4)
    session = onnxruntime.InferenceSession(builder.model("m").SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True) if tensor is not None}
    return torch.from_numpy(session.run(None, feed)[0])


def states(queries, keys, batch=1, kv_heads=HEADS, dtype=torch.float32):
    return (
        torch.randn(batch, HEADS, queries, DIM, dtype=dtype),
        *torch.randn(2, batch, kv_heads, keys, DIM, dtype=dtype).unbind(0),
    )


@pytest.mark.parametrize("lengths", [[7], [1, 12, 3], [5, 5, 5, 5], [4, 0, 6]])
def test_segments(lengths):
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    arguments = (*states(sum(lengths), sum(lengths)), None, bounds, None, None)
    torch.testing.assert_close(run(arguments, False), reference(*arguments, False, SCALE), rtol=1e-4, atol=1e-5)


def test_a_batch_without_masks():
    arguments = (*states(6, 6, batch=3), None, None, None, None)
    torch.testing.assert_close(run(arguments, False), reference(*arguments, False, SCALE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [1, 3, 9])
@pytest.mark.parametrize("past", [0, 1, 6])
def test_cache_and_padding(new, past):
    query, key, value = states(new, past + new, batch=3, kv_heads=2)
    mask = torch.ones(3, past + new, dtype=torch.int64)
    mask[1, : (past + new) // 2] = 0
    arguments = (query, key, value, mask, None, None, None)
    found, expected = run(arguments, True), reference(*arguments, True, SCALE)
    shown = mask[:, past:].bool()  # padding sees nothing, and nobody reads what it gets
    torch.testing.assert_close(found[shown], expected[shown], rtol=1e-4, atol=1e-5)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(("new", "past"), [(1, 9), (4, 6), (10, 0)])
@pytest.mark.parametrize("window", [None, 1, 4, 20])
@pytest.mark.parametrize("ahead", [False, True])
def test_windows_and_blocks_over_a_cache(new, past, window, ahead):
    query, key, value = states(new, past + new, batch=3, kv_heads=2)
    mask = torch.ones(3, past + new, dtype=torch.int64)
    mask[1, :2] = 0
    options = (lookahead(new, ((0, new),), ((3, 8),), ()) if ahead else None, window)
    arguments = (query, key, value, mask, None, None, None)
    found, expected = run(arguments, True, torch.float32, *options), reference(*arguments, True, SCALE, *options)
    shown = mask[:, past:].bool()
    torch.testing.assert_close(found[shown], expected[shown], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, ROWS, 2 * ROWS + 3])
def test_groups_of_keys(rows):
    """More rows than are taken at a time, and keys that only some of them see."""
    groups = torch.arange(5, dtype=torch.int32).repeat_interleave(4)
    visible = torch.zeros(rows, 5, dtype=torch.bool)
    visible[torch.arange(rows), torch.arange(rows) * 5 // max(rows, 1)] = True
    visible[::3, 2] = True
    arguments = (*states(rows, 20), None, None, groups, visible)
    torch.testing.assert_close(run(arguments, False), reference(*arguments, False, SCALE), rtol=1e-4, atol=1e-5)


def test_rows_that_see_no_group_stay_finite():
    groups, visible = torch.arange(3, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.bool)
    visible[0, 1] = True
    arguments = (*states(4, 3), None, None, groups, visible)
    found = run(arguments, False)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:, 0], reference(*arguments, False, SCALE)[:, 0], rtol=1e-4, atol=1e-5)


def test_float16_padding_is_no_nan():
    mask = torch.tensor([[0, 0, 0, 1]])
    arguments = (*(30 * x for x in states(4, 4, dtype=torch.float16)), mask, None, None, None)
    assert torch.isfinite(run(arguments, True, torch.float16)).all()


def test_other_forms_are_refused():
    query, key, value = states(4, 4)
    with pytest.raises(PassError, match="no translation"):
        run((query, key, value, torch.ones(1, 4), torch.tensor([0, 4]), None, None), True)
