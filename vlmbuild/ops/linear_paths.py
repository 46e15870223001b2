"""How products with a quantized weight are divided among a GPU's programs: known without Triton, for estimates of memory."""

from __future__ import annotations

ROW_SIDES = (16, 64, 128)
"""Rows of a tile: the first that holds all rows, or the last."""

PROGRAMS = 256
"""Programs that fill a GPU; fewer of them are split over the lanes that are summed."""

_LEAST_TILES = 4
"""Of lanes, that a part of a split sums at least."""


def row_side(rows: int) -> int:
    """Rows of the tile for so many rows."""
    return next((side for side in ROW_SIDES if side >= rows), ROW_SIDES[-1])


def split_parts(row_tiles: int, out_tiles: int, in_tiles: int) -> int:
    """Into how many parts a sum over lanes is split, so that a product with few rows and features fills the GPU."""
    return max(1, min(PROGRAMS // (row_tiles * out_tiles), in_tiles // _LEAST_TILES))
