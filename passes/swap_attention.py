"""Lower the captured attention operator to the kernel that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.ir.program import Program
from vlmbuild.rewrite.pass_manager import PassOutcome


@dataclass(frozen=True, slots=True)
class SwapAttention:
    """Replace the semantic operator by a backend's.

    Before: attention(query, key, value, key_mask, cu_seqlens, key_groups, visible_groups, causal, scale)
    After:  attention_auto(query, key, value, key_mask, cu_seqlens, key_groups, visible_groups, causal, scale)

    Legal because the operators have one signature and one meaning; they differ in the order of summation only.

    Attributes:
        backend: "triton", "sdpa", or "auto", which takes torch's kernels, and Triton on a GPU where tiles.json says it was
            measured, or for masks that no torch kernel takes; decided when it runs.
    """

    backend: Literal["auto", "triton", "sdpa"] = "auto"

    name: ClassVar[str] = "swap_attention"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        semantic = torch.ops.vlmbuild.attention.default
        lowered = getattr(torch.ops.vlmbuild, f"attention_{self.backend}").default
        for name, region in program.regions.items():
            sites = [node for node in region.graph.graph.nodes if node.target is semantic]
            for node in sites:
                node.target = lowered
            outcome.add(name, len(sites))
        return outcome
