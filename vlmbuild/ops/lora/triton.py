"""Launches the Triton kernels of LoRA: what `vlmbuild::lora` and its backward run on a GPU.

What it saves is memory traffic. For rows M, features N and 16-bit tensors plain torch moves 20 bytes for each of the M
* N results (2 and 4 to copy the base, 4 and 4 to add, 4 and 2 to cast back), and here it is 4. For a decoder block of
233 million parameters (hidden size 3584; N is 49,664 in all of its layers) and 2048 rows that is 0.61 ms against 0.12
ms of an H100's memory, where the block's own products take about 1.0 ms of its tensor cores. The adapters' products of
rank 16 are 0.6 % of the FLOPs, 0.09 ms of its ordinary float32 units, under the loads. These are estimates from bytes
and FLOPs, not measurements.

They are not put into the quantized product's own kernel. For more than 512 rows that is torch's. So few rows has only
generation with an adapter that is not merged; there the adapter's matrices are 4 % of an NF4 layer's bytes and have to be read
anyhow, so that two launches are all that could be saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmbuild.ops.lora.kernels import low_kernel, matrix_gradient_kernel, sum_kernel
from vlmbuild.ops.triton_util import INTERPRET, Launch, ceil_div, power_of_two, require_device

_LEAST_RANK, _MOST_RANK = 16, 64
"""Ranks of a tile."""
_LOW = {"ROWS": 16, "LANES": 16 if INTERPRET else 64, "num_warps": 4, "num_stages": 3}
_SUM = {"ROWS": 16 if INTERPRET else 64, "LANES": 16 if INTERPRET else 128, "num_warps": 8, "num_stages": 2}
_GRADIENT = {"ROWS": 16 if INTERPRET else 64, "LANES": 16 if INTERPRET else 32, "num_warps": 4, "num_stages": 3}
_PRECISION = {"PRECISION": "ieee"}


def _ranks(rank: int) -> dict[str, Any]:
    return {"RANKS": min(_MOST_RANK, power_of_two(rank, _LEAST_RANK))}


def low_launch(x: Tensor, matrix: Tensor, low: Tensor, factor: float) -> Launch:
    """The launch of `factor * x @ matrix.T` into float32 `low`; `x` `[rows, lanes]`; `matrix` `[rank, lanes]`, any strides."""
    (rows, lanes), rank = x.shape, low.shape[1]
    tile = _LOW | _ranks(rank)
    grid = (ceil_div(rows, tile["ROWS"]), ceil_div(rank, tile["RANKS"]))
    return Launch(low_kernel, grid, (x, matrix, low, rows, lanes, rank, *matrix.stride(), factor), _PRECISION, tile)


def sum_launch(base: Tensor | None, low: Tensor, matrix: Tensor, out: Tensor, factor: float) -> Launch:
    """The launch of `base + factor * low @ matrix` into `out` `[rows, lanes]`; `matrix` `[rank, lanes]` of any strides."""
    (rows, lanes), rank = out.shape, low.shape[1]
    tile = _SUM | _ranks(rank)
    grid = (ceil_div(rows, tile["ROWS"]), ceil_div(lanes, tile["LANES"]))
    arguments = (out if base is None else base, low, matrix, out, rows, lanes, rank, *matrix.stride(), factor)
    return Launch(sum_kernel, grid, arguments, {"BASE": base is not None, **_PRECISION}, tile)


def matrix_gradient_launch(x: Tensor, low: Tensor, out: Tensor, factor: float) -> Launch:
    """The launch of `factor * low.T @ x` into `out` `[rank, lanes]` of any strides."""
    (rows, lanes), rank = x.shape, low.shape[1]
    tile = _GRADIENT | _ranks(rank)
    grid = (ceil_div(lanes, tile["LANES"]), ceil_div(rank, tile["RANKS"]))
    arguments = (x, low, out, rows, lanes, rank, *out.stride(), factor)
    return Launch(matrix_gradient_kernel, grid, arguments, _PRECISION, tile)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def lora_triton(base: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """`vlmbuild.ops.lora.op.lora_reference`.

    Raises:
        DeviceError: the tensors are not where Triton runs.
    """
    require_device("lora", base)
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    x, flat = _rows(input), _rows(base)
    low = x.new_empty((len(x), len(down)), dtype=torch.float32)
    low_launch(x, down, low, 1.0).run()
    sum_launch(flat, low, up.T, out.view(flat.shape), scaling).run()
    return out


def lora_backward_triton(
    grad: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for input, down and up.

    Raises:
        DeviceError: the tensors are not where Triton runs.
    """
    require_device("lora", grad)
    grads = (input.new_empty(input.shape), torch.empty_like(down), torch.empty_like(up))
    if not grad.numel():
        return grads[0], grads[1].zero_(), grads[2].zero_()
    x, flat = _rows(input), _rows(grad)
    low, of_low = (x.new_empty((len(x), len(down)), dtype=torch.float32) for _ in range(2))
    low_launch(x, down, low, 1.0).run()
    low_launch(flat, up.T, of_low, scaling).run()
    sum_launch(None, of_low, down, grads[0].view(x.shape), 1.0).run()
    matrix_gradient_launch(x, of_low, grads[1], 1.0).run()
    matrix_gradient_launch(flat, low, grads[2].T, scaling).run()
    return grads
