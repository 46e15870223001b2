"""The passes of a build, in order. This page is the order; each line says why the pass stands where it does."""

from __future__ import annotations

from collections.abc import Mapping

from vlmbuild.adapters.lora import Lora
from vlmbuild.passes.add_lora import AddLora
from vlmbuild.passes.fuse_mrope import FuseMrope
from vlmbuild.passes.fuse_rms_norm import FuseRmsNorm
from vlmbuild.passes.normalize import Normalize
from vlmbuild.passes.quantize_linear import QuantizeLinear
from vlmbuild.passes.swap_attention import SwapAttention
from vlmbuild.passes.train_weights import TrainWeights
from vlmbuild.quant.decide import Decision
from vlmbuild.recipe import TARGET_OPTIONS, Recipe
from vlmbuild.rewrite.pass_manager import Pass

__all__ = [
    "AddLora",
    "FuseMrope",
    "FuseRmsNorm",
    "Normalize",
    "QuantizeLinear",
    "SwapAttention",
    "TrainWeights",
    "adapter_passes",
    "passes_for",
    "quantization_passes",
]


def passes_for(recipe: Recipe) -> tuple[Pass, ...]:
    """The passes that a recipe asks for, but for quantization: its decisions may need measurements on the graph so far."""
    return (
        Normalize(),  # first: patterns are written for clean graphs
        FuseMrope(),  # before attention is lowered: rotated queries and keys still meet the semantic operator
        *(
            [FuseRmsNorm()] if TARGET_OPTIONS[recipe.target].fuses_rms_norm else []
        ),  # only for targets with a faster operator
        SwapAttention(recipe.attention),  # after every pass that would look for the semantic operator
    )


def quantization_passes(recipe: Recipe, decisions: Mapping[str, Decision]) -> tuple[Pass, ...]:
    """Last, since it is the only pass that changes values."""
    asked = recipe.quantize is not None and recipe.quantize.format not in ("none", "source")
    packed = TARGET_OPTIONS[recipe.target].packs_weights
    return (QuantizeLinear(decisions, packed),) if asked or any(item.format for item in decisions.values()) else ()


def adapter_passes(adapters: Mapping[str, Lora], trained: frozenset[str]) -> tuple[Pass, ...]:
    """On a program that is loaded, for training: adapters of layers, and parameters that are trained whole."""
    return (AddLora(adapters), *([TrainWeights(trained)] if trained else []))
