"""Which way a product with a 4-bit weight takes on a GPU: known without Triton, for estimates of memory."""

from __future__ import annotations

FUSED_ROWS = 512
"""Up to here the product decodes tiles of the weight: every block of rows decodes all of it again, which by estimate takes as
long as the products themselves. Above, one dequantized weight serves all rows."""

_UNIT = 64


def unit_of(blocksize: int) -> int:
    """How many neighbouring values of a row a kernel decodes with one scale."""
    return min(_UNIT, blocksize)


def has_whole_units(in_features: int, blocksize: int) -> bool:
    """Whether the kernels take a layer: no scale changes inside of a unit, and no row ends there."""
    return in_features % unit_of(blocksize) == 0
