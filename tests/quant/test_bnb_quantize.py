"""The quantizer: bitsandbytes' own bytes for every input, in any pieces, on any number of threads, NaN visible."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmbuild.formats import BLOCK_SIZES
from vlmbuild.quant import bnb_quantize as quantizer
from vlmbuild.quant.bnb_quantize import quantize_blocks, quantize_scales

functional = pytest.importorskip("bitsandbytes.functional")

QUANT_TYPES = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = torch.finfo(torch.float32).max

quant_types = pytest.mark.parametrize("quant_type", QUANT_TYPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    # Thousands of tiny calls: threads would spend their time waiting for each other on a busy machine.
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def random(count, dtype=torch.float32, seed=0):
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        assert torch.equal(bits(mine), bits(other))


def assert_as_bitsandbytes(values, quant_type, blocksize):
    packed, state = functional.quantize_4bit(values, quant_type=quant_type, blocksize=blocksize)
    ours = quantize_blocks(values, quant_type=quant_type, blocksize=blocksize)
    assert_same(ours, (packed.flatten(), state.absmax))


def bounds(quant_type):
    values = functional.get_4bit_type(quant_type, device="cpu").sort().values
    return (values[:-1] + values[1:]) / 2


def neighbours(values, steps):
    """Return the values with the floats next to each, on either side."""
    infinity = torch.tensor(torch.inf)
    found = [values]
    for direction in (infinity, -infinity):
        near = values
        for _ in range(steps):
            near = torch.nextafter(near, direction)
            found.append(near)
    return torch.cat(found)


def blocks_around(values, absmax, blocksize):
    """Return the values in blocks that each start with `absmax`, alternately positive and negative."""
    rows = torch.nn.functional.pad(values, (0, -values.numel() % (blocksize - 1))).view(-1, blocksize - 1)
    first = torch.full((rows.shape[0], 1), absmax)
    first[1::2] *= -1
    return torch.cat([first, rows], dim=1).flatten()


@given(
    st.integers(0, 20_000),
    st.sampled_from(QUANT_TYPES),
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=150)
def test_any_size_gives_the_bytes_of_bitsandbytes(count, quant_type, blocksize, dtype, seed):
    assert_as_bitsandbytes(random(count, dtype, seed), quant_type, blocksize)


@quant_types
@dtypes
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_sizes_at_the_edge_of_a_block(quant_type, dtype, blocksize):
    for count in (1, 2, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize, 3 * blocksize + 2):
        assert_as_bitsandbytes(random(count, dtype), quant_type, blocksize)


@quant_types
@pytest.mark.parametrize("extra", [-4096, 0, 64, 4096 + 7])
def test_tensors_longer_than_what_is_scaled_at_a_time(quant_type, extra):
    assert_as_bitsandbytes(random(2 * quantizer._CHUNK + extra, torch.bfloat16), quant_type, 64)


@quant_types
def test_a_block_size_that_does_not_divide_what_is_scaled_at_a_time(quant_type, monkeypatch):
    monkeypatch.setattr(quantizer, "_CHUNK", 1000)
    for blocksize in (64, 512, 4096):  # 4096: a block is longer than a piece
        assert_as_bitsandbytes(random(3 * 4096 + 100), quant_type, blocksize)


@quant_types
@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("absmax", [1.0, 0.3, 0.0217, 7e-5, 1.1e-38, 3e-38, 5e-39, 1e-41, 1e30, 2e38, LARGEST])
def test_values_on_and_beside_every_bound(quant_type, blocksize, absmax):
    near = neighbours(bounds(quant_type) * absmax, steps=20)
    assert_as_bitsandbytes(blocks_around(near, absmax, blocksize), quant_type, blocksize)


@quant_types
def test_values_on_and_beside_every_bound_in_a_last_short_block(quant_type):
    for absmax in (1.0, 0.3, 7e-5, 5e-39, LARGEST):
        values = torch.cat([torch.tensor([absmax]), neighbours(bounds(quant_type) * absmax, steps=5)])
        assert_as_bitsandbytes(values, quant_type, 4096)
        assert_as_bitsandbytes(torch.cat([random(256), values[:255]]), quant_type, 256)


@quant_types
@dtypes
def test_blocks_of_extremes(quant_type, dtype):
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    kinds = [
        torch.zeros(64),
        torch.full((64,), -0.0),
        torch.tensor([0.0, -0.0] * 32),
        torch.tensor([1.0, -1.0] * 32),
        torch.tensor([info.max, info.min, info.max / 2, 1.0] * 16),
        torch.tensor([info.max] + [1e-3] * 63),
        torch.tensor([-1e4] + [0.0] * 63),
        torch.tensor([info.tiny, -info.tiny, info.tiny / 2, 0.0] * 16),
        torch.tensor([subnormal, -subnormal, 0.0, 3 * subnormal] * 16),
        torch.arange(64) * subnormal,
        torch.linspace(-1, 1, 64),
    ]
    values = torch.cat([kind.double() for kind in kinds]).to(dtype)
    for blocksize in (32, 64, 128):
        assert_as_bitsandbytes(values, quant_type, blocksize)
    for kind in kinds:  # each as a last short block
        assert_as_bitsandbytes(kind.to(dtype), quant_type, 128)
        assert_as_bitsandbytes(kind[:63].to(dtype), quant_type, 128)


@quant_types
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_half_precision_value(quant_type, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    shuffled = every[torch.randperm(every.numel(), generator=torch.Generator().manual_seed(1))]
    small = every[every.abs() <= 1]
    for blocksize in (64, 1024):
        assert_as_bitsandbytes(every, quant_type, blocksize)
        assert_as_bitsandbytes(shuffled, quant_type, blocksize)
        for absmax in (1.0, 1.5, 3.0):  # so that most are not rounded away beside a giant
            assert_as_bitsandbytes(blocks_around(small.float(), absmax, blocksize).to(dtype), quant_type, blocksize)


@given(
    st.lists(st.integers(0, 40), max_size=6),
    st.integers(0, 700),
    st.sampled_from(QUANT_TYPES),
    st.sampled_from([64, 256]),
    st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_consecutive_pieces_give_what_one_call_gives(blocks, rest, quant_type, blocksize, dtype):
    sizes = [count * blocksize for count in blocks] + [rest]
    values = random(sum(sizes), dtype)
    parts = [quantize_blocks(piece, quant_type=quant_type, blocksize=blocksize) for piece in values.split(sizes)]
    joined = tuple(torch.cat(kind) for kind in zip(*parts, strict=True))
    assert_same(joined, quantize_blocks(values, quant_type=quant_type, blocksize=blocksize))


def test_views_and_parameters():
    values = random(2 * 1000)[::2]
    assert_as_bitsandbytes(values, "nf4", 64)
    parameter = torch.nn.Parameter(random(1000))
    ours = quantize_blocks(parameter, quant_type="nf4", blocksize=64)
    assert_same(ours, quantize_blocks(parameter.detach(), quant_type="nf4", blocksize=64))
    assert not ours[1].requires_grad


def test_the_input_is_left_alone():
    for dtype in DTYPES:
        values = random(1000, dtype)
        before = values.clone()
        quantize_blocks(values, quant_type="fp4", blocksize=64)
        assert torch.equal(values, before)


@quant_types
@dtypes
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_show_in_the_absmax_of_their_block_alone(quant_type, dtype, bad):
    for place in (0, 63, 64 + 17, 5 * 64, 5 * 64 + 9):  # the last two in the short block
        values = random(5 * 64 + 10, dtype)
        values[place] = bad
        absmax = quantize_blocks(values, quant_type=quant_type, blocksize=64)[1]
        assert (~absmax.isfinite()).nonzero().flatten().tolist() == [place // 64]


def test_several_threads_at_once(monkeypatch):
    monkeypatch.setattr(quantizer, "_CHUNK", 2**13)  # many chunks, between which threads change
    inputs = [random(100_000 + 65 * seed, torch.bfloat16, seed) for seed in range(8)]

    def quantized(values):
        blocks = quantize_blocks(values, quant_type="nf4", blocksize=64)
        return (*blocks, *quantize_scales(blocks[1]))

    alone = [quantized(values) for values in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for together, expected in zip(pool.map(quantized, inputs), alone, strict=True):
                assert_same(together, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 7, 255, 256, 1000, 32_768, 32_769, 100_003, 1_000_003])
def test_scales_do_not_depend_on_the_number_of_threads(count, threads):
    absmax = random(count).abs()
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    torch.set_num_threads(threads)
    assert_same(quantize_scales(absmax), (codes, state.absmax, offset))


@quant_types
def test_blocks_do_not_depend_on_the_number_of_threads(quant_type):
    values = random(2 * quantizer._CHUNK + 100, torch.bfloat16)
    expected = quantize_blocks(values, quant_type=quant_type, blocksize=64)
    torch.set_num_threads(3)
    assert_same(quantize_blocks(values, quant_type=quant_type, blocksize=64), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@quant_types
def test_on_a_gpu_bitsandbytes_own_kernel_is_called(quant_type):
    values = random(1000, torch.bfloat16).cuda()
    assert_as_bitsandbytes(values, quant_type, 64)
