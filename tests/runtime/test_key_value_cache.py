"""The cache by itself: what transformers asks of it, dynamic and static."""

from __future__ import annotations

import pytest
import torch

from vlmbuild.ir.program import COMPUTE_DTYPE, Input
from vlmbuild.runtime.key_value_cache import KeyValueCache

INPUTS = [
    Input(f"past_key_values.{n}.{kind}", COMPUTE_DTYPE, ("batch", 2, "past", 4))
    for n in (0, 2)
    for kind in ("key", "value")
]


@pytest.fixture(params=[(None, 0), (None, 3), (9, 0)], ids=["dynamic", "dynamic in place", "static"])
def cache(request):
    """Two blocks, three rows, five tokens; every number says where it is."""
    made = KeyValueCache(INPUTS, *request.param)
    assert made.get_seq_length() == 0
    empty = made.past(3, torch.float32, torch.device("cpu"))
    assert {tuple(tensor.shape) for tensor in empty.values()} == {(3, 2, 0, 4)}
    made.keep(present(5))
    made.positions = torch.tensor([5, 4, 3])
    made.rows = {"visible": torch.tensor([[1], [2], [3]])}
    return made


def present(tokens):
    numbers = torch.arange(3 * 2 * 9 * 4).view(3, 2, 9, 4).float()[:, :, :tokens]
    return {entry.name: numbers + 1000 * place for place, entry in enumerate(INPUTS)}


def held(cache):
    return cache.past(3, torch.float32, torch.device("cpu"))


def test_keeps_and_grows(cache):
    assert cache.get_seq_length() == 5
    cache.keep(present(7))
    assert cache.get_seq_length() == 7
    assert all(torch.equal(tensor, present(7)[name]) for name, tensor in held(cache).items())


def test_beams_reorder_rows(cache):
    chosen = torch.tensor([2, 2, 0])
    cache.reorder_cache(chosen)
    assert all(torch.equal(tensor, present(5)[name][chosen]) for name, tensor in held(cache).items())
    assert cache.positions.tolist() == [3, 3, 5] and cache.rows["visible"].flatten().tolist() == [3, 3, 1]


def test_repeats_and_selects_rows(cache):
    cache.batch_repeat_interleave(2)
    assert cache.positions.tolist() == [5, 5, 4, 4, 3, 3]
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert cache.positions.tolist() == [5, 3]
    assert all(torch.equal(tensor, present(5)[name][[0, 2]]) for name, tensor in held(cache).items())


def test_forgets_the_last_tokens(cache):
    cache.crop(-2)
    assert cache.get_seq_length() == 3 and cache.positions.tolist() == [3, 2, 1]
    assert all(torch.equal(tensor, present(3)[name]) for name, tensor in held(cache).items())
    cache.crop(0)
    assert cache.get_seq_length() == 3


def test_buffers_stay_where_they_are():
    cache = KeyValueCache(INPUTS, 9)
    cache.keep(present(5))
    before = [tensor.data_ptr() for tensor in cache.buffers().values()]
    cache.keep(present(6))
    cache.advance()
    assert [tensor.data_ptr() for tensor in cache.buffers().values()] == before and cache.get_seq_length() == 7


def test_room_is_made_when_it_is_needed():
    cache = KeyValueCache(INPUTS, room=3)
    cache.keep(present(5))
    for tokens in range(5, 9):
        for name, buffer in cache.buffers().items():
            assert buffer.shape[2] == (8 if tokens < 8 else 11) and buffer[:, :, tokens:].eq(0).all()
            buffer[:, :, tokens] = present(9)[name][:, :, tokens]
        cache.advance()
    assert cache.get_seq_length() == 9
    assert all(torch.equal(tensor, present(9)[name]) for name, tensor in held(cache).items())
