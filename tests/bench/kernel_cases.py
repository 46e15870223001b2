"""Launches of kernels on tensors without data: every constant that programs use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vlmbuild.ops.attention.op import Masks
from vlmbuild.ops.attention.triton import backward_launches, forward_launches, one_row_launches
from vlmbuild.ops.cross_entropy.triton import cross_entropy_launch
from vlmbuild.ops.linear_4bit import triton as linear_4bit_triton
from vlmbuild.ops.linear_8bit import triton as linear_8bit_triton
from vlmbuild.ops.linear_paths import ROW_SIDES
from vlmbuild.ops.lora import triton as lora_triton
from vlmbuild.ops.rope.triton import rotate_launch
from vlmbuild.ops.tiles import SIDES
from vlmbuild.ops.triton_util import Launch

MODES = ("dense", "dense causal", "padded causal", "packed", "packed causal", "groups")
"""What masks: nothing, causal order, padding, segments, groups of keys."""
_KERNELS = ("attention_forward", "attention_grad_query", "attention_grad_key")
_ROTARY = ((12, 2, 128), (16, 16, 80), (16, 16, 64))
_LORA = ("down", "up", "up transposed", "gradient of input", "gradient of down", "gradient of up")
_ROWS = 1009  # prime, so that nothing is compiled for a lucky size


@dataclass(frozen=True)
class Case:
    """A kernel in one configuration.

    Attributes:
        name: Which.
        launch: Compute capability -> its launch.
        attention: Kernel and head dimension, where the share of the limit can be estimated.
    """

    name: str
    launch: Callable[[int], Launch]
    attention: tuple[str, int] | None = None


def resource_cases() -> list[Case]:
    """Every kernel, in bfloat16."""
    half = torch.bfloat16
    cases = [
        Case(f"{kernel} {dim} {mode}", partial(attention_launch, kernel, dim, mode, half), (kernel, dim))
        for kernel in _KERNELS
        for dim in (64, 80, 96, 128)
        for mode in ("packed causal", "groups")
    ]
    cases += [Case(f"attention_decode {dim}", partial(decode_launch, dim)) for dim in (64, 80, 96, 128)]
    cases += [
        Case(f"{kernel} {rows} rows", partial(linear_launch, kernel, rows))
        for kernel, sides in (("linear_4bit_vector", (1,)), ("linear_4bit", ROW_SIDES), ("linear_4bit_grad", ROW_SIDES))
        for rows in sides
    ]
    cases += [
        Case(f"{kernel} {_ROWS} rows", partial(quantize_case, kernel)) for kernel in ("int8 outliers", "int8 rows")
    ]
    cases += [
        Case(f"{kernel} {rows} rows", partial(linear_8bit_launch, kernel, rows))
        for kernel in ("linear_8bit", "linear_8bit_grad")
        for rows in ROW_SIDES
    ]
    cases += [Case(f"lora {part} {rank}", partial(lora_case, part, rank)) for part in _LORA for rank in (16, 64)]
    cases += [
        Case(f"rotation {heads}/{kv} x {dim}", partial(rotate_case, heads, kv, dim)) for heads, kv, dim in _ROTARY
    ]
    return [*cases, Case("cross_entropy 151936", cross_entropy_case)]


def decode_launch(dim: int, target: int) -> Launch:
    """One query row of 12 heads on 2 heads of 4001 keys."""
    half = torch.bfloat16
    query, key = _meta(1, 12, 1, dim, dtype=half), _meta(1, 2, 4001, dim, dtype=half)
    logsumexp = _meta(1, 12, 1, dtype=torch.float32)
    return one_row_launches(query, key, key, None, query.transpose(1, 2), logsumexp, 0.125, target)[0]


def rotate_case(heads: int, kv_heads: int, dim: int, _target: int) -> Launch:
    """Rows first, as a projection leaves them."""
    query, key = (_meta(1, _ROWS, many, dim, dtype=torch.bfloat16).transpose(1, 2) for many in (heads, kv_heads))
    angle = _meta(1, _ROWS, dim // 2, dtype=torch.float32)
    return rotate_launch(query, key, angle, angle, query, key)


def cross_entropy_case(_target: int) -> Launch:
    """With gradient."""
    logits = _meta(7, 151936, dtype=torch.bfloat16)
    return cross_entropy_launch(logits, _meta(7, dtype=torch.int64), _meta(7, dtype=torch.float32), logits)


def attention_launch(
    kernel: str, dim: int, mode: str, dtype: torch.dtype, target: int, tile: tuple[int, ...] | None = None
) -> Launch:
    """A kernel's launch for a head dimension and a mode of `MODES`, with its own tile or the one given."""
    launch = attention_launches(dim, mode, dtype, target)[_KERNELS.index(kernel)]
    return launch if tile is None else with_tile(launch, kernel, tile)


def attention_launches(dim: int, mode: str, dtype: torch.dtype, target: int) -> tuple[Launch, ...]:
    """Forward, query gradient, key gradient: in `[B, S, H, D]` memory order, four query heads a key head."""
    query, key, value = (_meta(1, _ROWS, heads, dim, dtype=dtype).transpose(1, 2) for heads in (8, 2, 2))
    masks = Masks(
        _meta(1, _ROWS, dtype=torch.bool) if "padded" in mode else None,
        _meta(5, dtype=torch.int32) if "packed" in mode else None,
        *((_meta(_ROWS, dtype=torch.int32), _meta(_ROWS, 7, dtype=torch.bool)) if mode == "groups" else (None, None)),
    )
    out, logsumexp = _meta(1, _ROWS, 8, dim, dtype=dtype), _meta(1, 8, _ROWS, dtype=torch.float32)
    grads = (_meta(*query.shape, dtype=dtype), *(_meta(*key.shape, dtype=dtype) for _ in range(2)))
    causal = "causal" in mode
    launches = (
        *forward_launches(query, key, value, masks, out, logsumexp, causal, 0.125, target),
        *backward_launches(out, query, key, value, masks, out, logsumexp, logsumexp, grads, causal, 0.125, target),
    )
    return tuple(launch for launch in launches if "GQA" in launch.constants)  # not those that make masks ready


def linear_launch(kernel: str, rows: int, target: int, tile: tuple[int, ...] | None = None) -> Launch:
    """A 4-bit kernel's launch on an NF4 layer of 8960 by 1536 with double quantization and a bias."""
    wide, narrow, half = 1536, 8960, torch.bfloat16
    blocks = wide * narrow // 64
    buffers = (
        _meta(wide * narrow // 2, dtype=torch.uint8),
        _meta(blocks, dtype=torch.uint8),
        _meta(-(-blocks // 256), dtype=torch.float32),
        _meta(dtype=torch.float32),
    )
    geometry = (narrow, wide, 64, "nf4", half)
    x, out = _meta(rows, narrow, dtype=half), _meta(rows, wide, dtype=half)
    if kernel == "linear_4bit_grad":
        launch = linear_4bit_triton.grad_input_launch(out, buffers, x, geometry, target)
    else:
        launch = linear_4bit_triton.linear_launch(x, buffers, _meta(wide, dtype=half), out, geometry, target)
    return launch if tile is None else with_tile(launch, kernel, tile)


def linear_8bit_launch(kernel: str, rows: int, target: int, tile: tuple[int, ...] | None = None) -> Launch:
    """An 8-bit kernel's launch on a layer of 8960 by 1536 with outliers and a bias."""
    wide, narrow, half = 1536, 8960, torch.bfloat16
    weight, scales = _meta(wide, narrow, dtype=torch.int8), _meta(wide, dtype=torch.float32)
    x, out = _meta(rows, narrow, dtype=half), _meta(rows, wide, dtype=half)
    if kernel == "linear_8bit_grad":
        launch = linear_8bit_triton.grad_input_8bit_launch(out, weight, scales, x, target)
    else:
        bias = _meta(wide, dtype=half)
        launch = linear_8bit_triton.linear_8bit_launch(
            x, *_quantized(x), weight, scales, bias, out, target, outliers=True
        )
    return launch if tile is None else with_tile(launch, kernel, tile)


def quantize_case(kernel: str, _target: int) -> Launch:
    """The search for columns with outliers, or the rounding of rows to integers."""
    x, flags = _meta(_ROWS, 8960, dtype=torch.bfloat16), _meta(8960, dtype=torch.uint8)
    if kernel == "int8 outliers":
        return linear_8bit_triton.outliers_launch(x, flags, 6.0)
    return linear_8bit_triton.quantize_launch(x, flags, *_quantized(x), 6.0)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, narrow = x.shape
    integers = _meta(rows, narrow, dtype=torch.int8)
    return integers, _meta(rows, dtype=torch.float32), _meta(1 + narrow, dtype=torch.int32)


def lora_case(part: str, rank: int, _target: int) -> Launch:
    """One of the launches of an adapter on a layer of 3584 by 18944."""
    narrow, wide, half = 3584, 18944, torch.bfloat16
    x, base, low = (
        _meta(_ROWS, narrow, dtype=half),
        _meta(_ROWS, wide, dtype=half),
        _meta(_ROWS, rank, dtype=torch.float32),
    )
    down, up = _meta(rank, narrow, dtype=torch.float32), _meta(wide, rank, dtype=torch.float32).T
    return {
        "down": lambda: lora_triton.low_launch(x, down, low, 1.0),
        "up": lambda: lora_triton.sum_launch(base, low, up, base, 0.5),
        "up transposed": lambda: lora_triton.low_launch(base, up, low, 0.5),
        "gradient of input": lambda: lora_triton.sum_launch(None, low, down, x, 1.0),
        "gradient of down": lambda: lora_triton.matrix_gradient_launch(x, low, down, 1.0),
        "gradient of up": lambda: lora_triton.matrix_gradient_launch(base, low, up, 0.5),
    }[part]()


def with_tile(launch: Launch, kernel: str, tile: tuple[int, ...]) -> Launch:
    """The launch with another tile, to be compiled only: its grid stays as it was."""
    return launch._replace(tile=launch.tile | dict(zip((*SIDES[kernel], "num_warps", "num_stages"), tile, strict=True)))


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
