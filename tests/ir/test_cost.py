"""Costs as formulas: counted by hand for one layer, and read back."""

from __future__ import annotations

import pytest
import tiny

from vlmbuild.ir.cost import region_cost
from vlmbuild.ir.dims import everyday_value, growth


def test_flops_of_a_layer_are_those_of_its_products(pristine_built):
    cost = region_cost(pristine_built.regions["language_model.layers"], 2)
    width, heads, kv, inner = 256, 2, 1, 192
    products = 2 * (width * (heads + 2 * kv) * tiny.HEAD_DIM + heads * tiny.HEAD_DIM * width + 3 * width * inner)
    attention = 4 * heads * tiny.HEAD_DIM
    assert cost.flops == f"{attention}*sequence**2 + {products}*sequence"


def test_bytes_are_read_and_written_once_an_operator():
    region = tiny.linear_region()  # [1, tokens, 128] to [1, tokens, 64], with bias
    assert region_cost(region, 2).bytes == f"{2 * (128 + 64)}*tokens + {2 * (64 * 128 + 64)}"
    assert region_cost(region, 4).bytes == f"{4 * (128 + 64)}*tokens + {4 * (64 * 128 + 64)}"
    assert region_cost(region, 2).flops == f"{2 * 128 * 64}*tokens"


def test_a_fused_rotation_moves_less(pristine_program, pristine_built):
    before, after = (
        region_cost(program.regions["language_model.layers"], 2).bytes for program in (pristine_program, pristine_built)
    )
    assert growth(before, after) < -0.02


def test_formulas_are_read_back():
    assert everyday_value("2*sequence**2 + 3*samples + 7") == 2 * 1024**2 + 3 * 2 + 7
    assert everyday_value("__import__('os')") is None
    assert growth("100*sequence", "110*sequence") == pytest.approx(0.1)
    assert growth("0", "5") is None
