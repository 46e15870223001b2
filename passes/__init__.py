"""The passes of a build, in order. This page is the order; each line says why the pass stands where it does."""

from __future__ import annotations

from vlmbuild.passes.add_lora import AddLora
from vlmbuild.passes.fuse_mrope import FuseMrope
from vlmbuild.passes.normalize import Normalize
from vlmbuild.passes.quantize_linear import QuantizeLinear
from vlmbuild.passes.swap_attention import SwapAttention

from vlmbuild.pipeline import Pass
from vlmbuild.recipe import Recipe

__all__ = ["AddLora", "FuseMrope", "Normalize", "QuantizeLinear", "SwapAttention", "passes_for"]


def passes_for(recipe: Recipe) -> tuple[Pass, ...]:
    """The passes that a recipe asks for."""
    steps: list[Pass] = [
        Normalize(),  # first: patterns are written for clean graphs
        FuseMrope(),  # before attention is lowered: rotated queries and keys still meet the semantic operator
        SwapAttention(recipe.attention),  # after every pass that would look for the semantic operator
    ]
    if recipe.quantize is not None:
        steps.append(QuantizeLinear(recipe.quantize))  # last: the only pass that changes values
    return tuple(steps)
