"""The passes of a build, in order. This page is the order; each line says why the pass stands where it does."""

from __future__ import annotations

from collections.abc import Mapping

from vlmbuild.adapters.lora import Lora
from vlmbuild.passes.add_lora import AddLora
from vlmbuild.passes.fuse_rms_norm import FuseRmsNorm
from vlmbuild.passes.fuse_rope import FuseRope
from vlmbuild.passes.normalize import Normalize
from vlmbuild.passes.quantize_linear import QuantizeLinear
from vlmbuild.passes.swap_attention import SwapAttention
from vlmbuild.passes.train_weights import TrainWeights
from vlmbuild.quant.decide import Decision
from vlmbuild.recipe import TARGET_OPTIONS, Recipe
from vlmbuild.rewrite.pass_manager import Pass

__all__ = [
    "EXTRA_PASSES",
    "AddLora",
    "FuseRmsNorm",
    "FuseRope",
    "Normalize",
    "QuantizeLinear",
    "SwapAttention",
    "TrainWeights",
    "adapter_passes",
    "passes_for",
    "quantization_passes",
]

EXTRA_PASSES: dict[str, Pass] = {}
"""Passes of plugins that the user named, by name."""


def passes_for(recipe: Recipe) -> tuple[Pass, ...]:
    """Return a recipe's passes without quantization, whose decisions may need measurements on the graph so far."""
    options = TARGET_OPTIONS[recipe.target]
    return (
        Normalize(),  # first: patterns are written for clean graphs
        FuseRope(),  # before attention is lowered: rotated queries and keys still meet the semantic operator
        *([FuseRmsNorm()] if options.fuses_rms_norm else []),  # only for targets with a faster operator
        *EXTRA_PASSES.values(),  # on fused graphs, and before attention is lowered, as ours
        SwapAttention(recipe.attention),  # after every pass that would look for the semantic operator
    )


def quantization_passes(recipe: Recipe, decisions: Mapping[str, Decision]) -> tuple[Pass, ...]:
    """Return the quantization pass, if there is anything to quantize: last, since it alone changes values."""
    requested = recipe.quantize is not None and recipe.quantize.format not in ("none", "source")
    packed = TARGET_OPTIONS[recipe.target].packs_weights
    return (QuantizeLinear(decisions, packed),) if requested or any(item.format for item in decisions.values()) else ()


def adapter_passes(adapters: Mapping[str, Lora], trained: frozenset[str]) -> tuple[Pass, ...]:
    """Return the passes for training a loaded program: adapters of layers, and parameters that are trained whole."""
    return (AddLora(adapters), *([TrainWeights(trained)] if trained else []))
