"""The attention operators against exact attention in float64: values, gradients, memory, compiler contract, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from exactness import lookahead
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import vlmbuild.ops  # noqa: F401
from vlmbuild.errors import DeviceError, UsageError
from vlmbuild.ops.attention.sdpa import ROWS

OPS = torch.ops.vlmbuild
NAMES = ("attention", "attention_auto")
SCALE = 0.3
# float32 sums of tens of terms, and torch's CPU kernel uses a fast exponential.
ATOL = 5e-6


def tensors(batch: int, heads: int, kv_heads: int, length: int, keys: int, dim: int = 8) -> tuple[torch.Tensor, ...]:
    """Query, key and value in the layouts models have: views of `[B, S, H, D]`."""
    shapes = ((batch, length, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim))
    return tuple(torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes)


def exact(
    query, key, value, key_mask, cu_seqlens, key_groups, visible_groups, causal, scale, lookahead=None, window=None
):  # type: ignore[no-untyped-def]
    """Compute one row at a time, from the definition: a softmax over the keys that a query may see."""
    groups, shift = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    bounds = [0, key.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = []
    for b in range(query.shape[0]):
        for i in range(query.shape[2]):
            seen = [
                j
                for low, high in itertools.pairwise(bounds)
                for j in range(low, high)
                if (cu_seqlens is None or low <= i < high)
                and (not causal or j <= i + shift + (0 if lookahead is None else lookahead[b, i]))
                and (window is None or j > i + shift - window)
                and (key_mask is None or key_mask[b, j])
                and (key_groups is None or visible_groups[i, key_groups[j]])
            ]
            k, v = (x[b].repeat_interleave(groups, 0)[:, seen].double() for x in (key, value))
            scores = torch.einsum("hd,htd->ht", query[b, :, i].double(), k) * scale
            rows.append(torch.einsum("ht,htd->hd", scores.softmax(-1), v))
    return torch.stack(rows).unflatten(0, (query.shape[0], query.shape[2]))


def check(name: str, arguments: tuple) -> None:  # type: ignore[type-arg]
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    actual, expected = getattr(OPS, name)(*arguments), exact(*arguments)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, atol=ATOL, rtol=0)
    weight = torch.randn(actual.shape)
    grads = torch.autograd.grad((actual * weight).sum(), leaves)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True)
    for have, want in zip(grads, wanted, strict=True):
        want = torch.zeros_like(have) if want is None else want
        torch.testing.assert_close(have, want, atol=2 * ATOL, rtol=0)


def padding(batch: int, keys: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Padded on the left in the first sample, on the right in the last."""
    mask = torch.ones(batch, keys, dtype=dtype)
    mask[0, :2], mask[-1, keys - 2 :] = 0, 0
    return mask


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("length", "keys"), [(9, 9), (1, 9), (4, 9), (9, 4)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_dense(name: str, length: int, keys: int, causal: bool, masked: bool) -> None:
    mask = padding(2, keys) if masked else None
    check(name, (*tensors(2, 4, 2, length, keys), mask, None, None, None, causal, SCALE))


def test_on_a_cpu_sdpa_is_what_auto_takes() -> None:
    arguments = (*tensors(2, 4, 2, 9, 9), padding(2, 9), None, None, None, True, SCALE)
    assert torch.equal(OPS.attention_sdpa(*arguments), OPS.attention_auto(*arguments))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bounds", [[0, 12], [0, 4, 8, 12], [0, 3, 3, 7, 11, 12], [0, 5, 9, 9, 9], [0, 0]])
def test_packed(name: str, causal: bool, masked: bool, bounds: list[int]) -> None:
    mask = padding(1, 12, torch.bool) if masked else None
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    check(name, (*tensors(1, 4, 2, 12, 12), mask, cu_seqlens, None, None, causal, SCALE))


GROUPS = {
    "padding sees what is real": (
        [0, 0, 0, 1, 1, 2, 2, 3],
        [[1, 1, 0, 0]] * 3 + [[1, 0, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2 + [[0, 0, 1, 0]],
    ),
    "text before, between and after images": (
        [0, 0, 1, 1, 2, 2, 3, 3],
        [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]],
    ),
    "nothing, all, one of the groups": ([2, 0, 1, 0, 2, 2], [[0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]]),
    "a group without keys": ([0, 0, 2], [[0, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1]]),
    "one row": ([0, 1, 1, 0], [[0, 1]]),
}
"""Name -> the group of every key, and the groups that every query sees."""


def groups_of(case: str, dtype: torch.dtype = torch.bool) -> tuple[torch.Tensor, torch.Tensor]:
    key_groups, visible = GROUPS[case]
    return torch.tensor(key_groups, dtype=torch.int32), torch.tensor(visible).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_groups_of_keys(name: str, case: str, dtype: torch.dtype) -> None:
    key_groups, visible = groups_of(case, dtype)
    inputs = tensors(1, 4, 2, len(visible), len(key_groups))
    check(name, (*inputs, None, None, key_groups, visible, False, SCALE))


def test_a_query_depends_on_every_group_that_it_sees_and_on_no_other() -> None:
    key_groups, visible = groups_of("text before, between and after images")
    query, key, value = (x.detach() for x in tensors(1, 2, 2, len(visible), len(key_groups)))
    before = OPS.attention_auto(query, key, value, None, None, key_groups, visible, False, SCALE)
    for group in range(4):
        changed = value + (key_groups == group)[:, None]
        after = OPS.attention_auto(query, key, changed, None, None, key_groups, visible, False, SCALE)
        moved = (after != before).any(-1).any(-1)[0]
        assert torch.equal(moved, visible[:, group])


@given(
    key_groups=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    rows=st.lists(st.integers(0, 15), min_size=1, max_size=9),
)
@settings(max_examples=25, deadline=None)
def test_any_groups(key_groups: list[int], rows: list[int]) -> None:
    visible = torch.tensor([[row >> group & 1 for group in range(4)] for row in rows])
    arguments = (
        *tensors(1, 2, 1, len(rows), len(key_groups)),
        None,
        None,
        torch.tensor(key_groups),
        visible,
        False,
        SCALE,
    )
    for name in ("attention", "attention_auto"):
        check(name, arguments)


BLOCKS = ((3, 9), (12, 18), (19, 20))
"""Tokens that see each other: longer than the windows, at a sample's end, and one alone."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bounds", [None, [0, 20], [0, 10, 20], [0, 3, 3, 18, 19]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("window", "blocks"), [(4, ()), (1, ()), (50, ()), (None, BLOCKS), (4, BLOCKS)])
def test_windows_and_blocks(name: str, bounds: list[int] | None, masked: bool, window: int | None, blocks) -> None:  # type: ignore[no-untyped-def]
    batch = 2 if bounds is None else 1
    ahead = lookahead(20, *([blocks, blocks[:1]][:batch])) if blocks else None
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    mask = padding(batch, 20) if masked else None
    check(name, (*tensors(batch, 4, 2, 20, 20), mask, cu_seqlens, None, None, True, SCALE, ahead, window))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("length", "keys"), [(1, 20), (6, 20), (20, 6)])
@pytest.mark.parametrize("masked", [False, True])
def test_windows_over_a_cache(name: str, length: int, keys: int, masked: bool) -> None:
    mask = padding(2, keys) if masked else None
    inputs = tensors(2, 4, 2, length, keys)
    for window, blocks in ((5, ()), (None, ((0, length),)), (3, ((0, length // 2),))):
        ahead = lookahead(length, blocks, ()) if blocks else None
        check(name, (*inputs, mask, None, None, None, True, SCALE, ahead, window))


@pytest.mark.parametrize("window", [None, 40, 129, 200])
def test_more_rows_than_attend_at_a_time(window: int | None) -> None:
    """Blocks across the seams between rows that attend at a time, within segments of one length and of another."""
    ahead = lookahead(2 * ROWS + 50, ((ROWS - 20, ROWS + 30), (2 * ROWS, 2 * ROWS + 20)))
    for bounds in ([0, 2 * ROWS + 50], [0, ROWS + 25, 2 * ROWS + 50]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        for blocks in (ahead, None) if window else (ahead,):
            inputs = tensors(1, 2, 1, 2 * ROWS + 50, 2 * ROWS + 50, 4)
            check("attention_auto", (*inputs, None, cu_seqlens, None, None, True, SCALE, blocks, window))


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 6), min_size=0, max_size=6),
    window=st.none() | st.integers(1, 9),
    bits=st.integers(0, 2**28),
)
@settings(max_examples=25, deadline=None)
def test_any_windows_and_blocks(lengths: list[int], cuts: list[int], window: int | None, bits: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = max(1, sum(lengths))
    edges = sorted({0, *itertools.accumulate(cuts), *cu_seqlens.tolist()} & set(range(rows)) | {rows})
    blocks = tuple(itertools.pairwise(edges))[::2]  # none crosses a sample's end
    mask = torch.tensor([[bits >> n & 1 for n in range(rows)]])
    options = (True, SCALE, lookahead(rows, blocks), window)
    for name in NAMES:
        check(name, (*tensors(1, 2, 1, rows, rows), mask, cu_seqlens, None, None, *options))


def test_graphs_do_not_hold_what_is_not_used() -> None:
    def model(*arguments):  # type: ignore[no-untyped-def]
        return OPS.attention(*arguments, None, None, None, None, True, SCALE, None, None)

    traced = torch.fx.experimental.proxy_tensor.make_fx(model)(*tensors(1, 2, 2, 5, 5))
    (node,) = (node for node in traced.graph.nodes if node.op == "call_function" and "attention" in str(node.target))
    assert node.args[3:] == (None, None, None, None, True, SCALE)
    assert not node.kwargs


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    spare=st.integers(0, 3),
    causal=st.booleans(),
    bits=st.integers(0, 2**30),
)
@settings(max_examples=25, deadline=None)
def test_any_segments_and_mask(lengths: list[int], spare: int, causal: bool, bits: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = max(1, sum(lengths) + spare)
    mask = torch.tensor([[bits >> n & 1 for n in range(rows)]])
    arguments = (*tensors(1, 2, 1, rows, rows), mask, cu_seqlens, None, None, causal, SCALE)
    for name in ("attention", "attention_auto"):
        check(name, arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_without_keys_are_zero(name: str, packed: bool) -> None:
    query, key, value = tensors(1, 2, 2, 6, 6)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32) if packed else None
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]]) if packed else torch.zeros(1, 6, dtype=torch.long)
    out = getattr(OPS, name)(query, key, value, mask, cu_seqlens, None, None, False, SCALE)
    assert out[:, : 2 if packed else 6].eq(0).all()
    for grad in torch.autograd.grad(out.sum(), (query, key, value)):
        assert grad.isfinite().all()
        assert grad[:, :, :2].eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_or_no_keys(name: str) -> None:
    for length, keys in ((0, 3), (3, 0)):
        inputs = tensors(1, 2, 2, length, keys)
        out = getattr(OPS, name)(*inputs, None, None, None, None, False, SCALE)
        assert out.shape == (1, length, 2, 8)
        assert out.eq(0).all()
        assert all(grad.eq(0).all() for grad in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors(2, 4, 2, 9, 9)]
    out = getattr(OPS, name)(*inputs, padding(2, 9), None, None, None, True, SCALE)
    assert out.dtype == dtype
    expected = exact(*inputs, padding(2, 9), None, None, None, True, SCALE)
    torch.testing.assert_close(out.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 3e-3, rtol=0)
    assert all(grad.dtype == dtype for grad in torch.autograd.grad(out.float().sum(), inputs))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_quadratic_is_saved(name: str) -> None:
    sizes: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    inputs = tensors(1, 2, 2, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        getattr(OPS, name)(*inputs, padding(1, 64), None, None, None, True, SCALE)
    assert max(sizes) == inputs[0].numel() < 64 * 64


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    operator, cu_seqlens = getattr(OPS, name).default, torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    opcheck(operator, (*tensors(1, 4, 2, 7, 7), padding(1, 7), cu_seqlens, None, None, True, SCALE))
    key_groups, visible = groups_of("nothing, all, one of the groups")
    opcheck(operator, (*tensors(1, 4, 2, 5, 6), None, None, key_groups, visible, False, SCALE))
    opcheck(operator, (*tensors(1, 4, 2, 7, 7), None, cu_seqlens, None, None, True, SCALE, lookahead(7, ((3, 6),)), 2))


def test_opcheck_of_the_reference_backward() -> None:
    inputs = (x.detach() for x in tensors(2, 4, 2, 7, 7))
    arguments = (torch.randn(2, 7, 4, 8), *inputs, padding(2, 7), None, None, None, True, SCALE)
    opcheck(OPS.attention_backward.default, arguments)


@pytest.mark.parametrize("name", ["attention_auto"])
def test_opcheck_of_forward_and_backward(name: str) -> None:
    arguments = (*tensors(2, 4, 2, 7, 7), padding(2, 7), None, None, None, True, SCALE)
    opcheck(getattr(OPS, f"{name}_forward").default, arguments)
    query, key, value = (x.detach() for x in arguments[:3])
    results = getattr(OPS, f"{name}_forward")(query, key, value, *arguments[3:])
    grad = torch.randn(2, 7, 4, 8)
    opcheck(getattr(OPS, f"{name}_backward").default, (grad, query, key, value, *arguments[3:7], *results, True, SCALE))


@pytest.mark.parametrize(("name", "packed"), [("attention", False), ("attention_auto", True)])
def test_compiles_once_for_all_shapes_with_gradients(name: str, packed: bool) -> None:
    operator, counter = getattr(OPS, name), CompileCounterWithBackend("aot_eager")

    def model(query, key, value, mask, cu_seqlens):  # type: ignore[no-untyped-def]
        # A literal scale: graphs hold it as a constant, while a global float would be made dynamic.
        return operator(query, key, value, mask, cu_seqlens, None, None, not packed, 0.3).sin().sum()

    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for batch, length, bounds in ((5, 9, [0, 4, 9]), (6, 11, [0, 2, 3, 11]), (3, 7, [0, 1, 2, 3, 7])):
        inputs = tensors(1 if packed else batch, 4, 4 if packed else 2, length, length)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
        mask = None if packed else padding(batch, length)
        actual = torch.autograd.grad(compiled(*inputs, mask, cu_seqlens), inputs)
        for have, want in zip(actual, torch.autograd.grad(model(*inputs, mask, cu_seqlens), inputs), strict=True):
            torch.testing.assert_close(have, want, atol=1e-6, rtol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["attention", "attention_triton"])
def test_exports_on_meta_with_symbolic_sizes(name: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, query, key, value, mask):  # type: ignore[no-untyped-def]
            return getattr(OPS, name)(query, key, value, mask, None, None, None, True, SCALE)

    batch, length, past = (torch.export.Dim(n, min=2, max=4096) for n in ("batch", "length", "past"))
    example = (
        torch.empty(3, 4, 5, 8, device="meta"),
        torch.empty(3, 2, 9, 8, device="meta"),
        torch.empty(3, 2, 9, 8, device="meta"),
        torch.empty(3, 9, dtype=torch.long, device="meta"),
    )
    sizes = ({0: batch, 2: length}, {0: batch, 2: past}, {0: batch, 2: past}, {0: batch, 1: past})
    program = torch.export.export(Model(), example, dynamic_shapes=sizes)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == [f"vlmbuild.{name}.default"]
    assert [str(n) for n in calls[0].meta["val"].shape[2:]] == ["4", "8"]


def test_errors_say_what_does_not_fit() -> None:
    query, key, value = tensors(2, 4, 3, 5, 5)
    with pytest.raises(UsageError, match="not a multiple of the key heads"):
        OPS.attention(query, key, value, None, None, None, None, False, SCALE)
    query, key, value = tensors(2, 4, 2, 5, 6)
    one = tensors(1, 4, 2, 5, 6)
    for arguments, message in (
        ((query, key, value[:, :, 1:], None, None, None, None), "key and value are"),
        ((query[:1], key, value, None, None, None, None), "batch and head dimension"),
        ((query, key, value, torch.ones(2, 5), None, None, None), "key_mask is bool or integer"),
        ((query, key, value, torch.ones(2, 6), None, None, None), "key_mask is bool or integer"),
        ((query, key, value, None, torch.tensor([0, 5]), None, None), "needs B == 1 and S == T"),
        ((query, key, value, None, None, torch.zeros(6).long(), torch.ones(5, 1)), "needs B == 1"),
        ((*one, None, None, torch.zeros(6).long(), None), "belong together"),
        ((*one, None, None, torch.zeros(5).long(), torch.ones(5, 1)), r"key_groups is integer \[T\]"),
        ((*one, torch.ones(1, 6).long(), None, torch.zeros(6).long(), torch.ones(5, 1)), "groups of keys say all"),
    ):
        for name in NAMES:
            with pytest.raises(UsageError, match=message):
                getattr(OPS, name)(*arguments, False, SCALE)
    for causal, ahead, window, message in (
        (False, None, 3, "need causal order"),
        (False, lookahead(5, ()), None, "need causal order"),
        (True, None, 0, "window of 0 keys"),
        (True, lookahead(4, ()), None, r"lookahead is integer \[B, S\]"),
        (True, torch.zeros(1, 5), None, r"lookahead is integer \[B, S\]"),
    ):
        for name in NAMES:
            with pytest.raises(UsageError, match=message):
                getattr(OPS, name)(*one, None, None, None, None, causal, SCALE, ahead, window)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is for machines without a GPU")
def test_triton_operator_names_the_device() -> None:
    pytest.importorskip("triton", reason="triton is Linux only")
    with pytest.raises(DeviceError, match="needs a CUDA tensor, got one on cpu"):
        OPS.attention_triton(*tensors(1, 2, 2, 5, 5), None, None, None, None, False, SCALE)
