"""Give text blocks a key-value cache, for generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmbuild.ir.program import Program
from vlmbuild.kv_cache.block import CacheForm
from vlmbuild.kv_cache.program import with_cache
from vlmbuild.rewrite.pass_manager import PassOutcome


@dataclass(frozen=True, slots=True)
class AddCache:
    """Replace a program's variants by cached ones: `vlmbuild.kv_cache.program.with_cache` says what they take and return.

    Before: v3 = layers(v0, cos, sin, bounds)
    After:  v3, present.0.key, present.0.value = layers.cached(
                v0, cos, sin, mask, past_key_values.0.key, past_key_values.0.value
            )

    Legal because a causal query sees what came before it, whether that is computed in the same call or was in an earlier one.
    Regions with a cache, and the parts of regions that read images, have names of their own; every one is a site.

    Attributes:
        form: "growing" for prompts and steps, "static" for steps of one token into buffers.
    """

    form: CacheForm = "growing"

    name: ClassVar[str] = "add_cache"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        cached = with_cache(program, self.form)
        for name in cached.regions.keys() - program.regions.keys():
            outcome.add(name, 1)
        program.variants, program.regions = cached.variants, cached.regions
        return outcome
