"""LoRA: the adapter of a linear layer (arXiv:2106.09685, section 4.1), and the adapter of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vlmbuild.errors import UsageError


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapter of a linear layer.

    Attributes:
        r: Rank.
        alpha: Numerator of the scale.
        dropout: Probability that a channel of the adapter's input is zeroed in training.
        rslora: Scale by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732, section 3).
    """

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise UsageError(f"r is {self.r!r}. Pass a whole number, at least 1.")
        if not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha):
            raise UsageError(f"alpha is {self.alpha!r}. Pass a finite number.")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout!r}. Pass a number from 0 to below 1.")

    @property
    def scaling(self) -> float:
        """The factor on the product of the two matrices."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The trained parts of a model.

    Attributes:
        loras: Module name -> its LoRA adapter.
        modules: Names of the modules that are trained whole.
        trained: Names of their parameters.
    """

    loras: Mapping[str, Lora]
    modules: tuple[str, ...] = ()
    trained: frozenset[str] = frozenset()


def with_patterns(lora: Lora, module: str, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> Lora:
    """Apply a module's own rank and alpha from PEFT's `rank_pattern` and `alpha_pattern`.

    The patterns are regular expressions for the end of a module's name; the first match holds.
    """

    def matches(pattern: str) -> bool:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None

    rank = next((value for pattern, value in ranks.items() if matches(pattern)), lora.r)
    alpha = next((value for pattern, value in alphas.items() if matches(pattern)), lora.alpha)
    return replace(lora, r=rank, alpha=float(alpha))
