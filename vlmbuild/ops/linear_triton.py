"""How products with a quantized weight are divided among programs and put together again, whatever the weight's format."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbuild.ops.linear_paths import ROW_SIDES, row_side, split_parts
from vlmbuild.ops.tiles import tile_of
from vlmbuild.ops.triton_util import INTERPRET, ceil_div


def row_tile(rows: int) -> int:
    """Rows of a program's tile."""
    return ROW_SIDES[0] if INTERPRET else row_side(rows)


def tile_parts(kernel: str, rows: int, wide: int, narrow: int, dtype: torch.dtype, target: int) -> int:
    """Into how many parts the sum over `narrow` lanes is split, so that few rows and features fill the GPU."""
    side = row_tile(rows)
    tile = tile_of(kernel, side, dtype, target)
    return split_parts(ceil_div(rows, side), ceil_div(wide, tile["OUTS"]), narrow // tile["INS"])


def split(out: Tensor, parts: int) -> Tensor | None:
    """Float32 memory for the parts of a result `[rows, out]`, `[parts, rows, out]`; None where there is one part."""
    return None if parts == 1 else out.new_empty((parts, *out.shape), dtype=torch.float32)


def joined(out: Tensor, partial: Tensor | None, bias: Tensor | None) -> Tensor:
    """The result: `out` as it was written, or the sum of its parts and the bias, put there."""
    if partial is None:
        return out
    total = partial.sum(0) if bias is None else partial.sum(0).add_(bias)
    return out.copy_(total.view(out.shape))
