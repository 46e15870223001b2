"""The part of a model that running its program needs: the program, its regions and weights, and forms with a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmbuild.families import Family
from vlmbuild.ir.program import Program
from vlmbuild.kv_cache.block import CacheForm
from vlmbuild.kv_cache.program import with_cache
from vlmbuild.runtime.hf import GenerationHooks
from vlmbuild.runtime.torch.conventions import TrainerConventions
from vlmbuild.runtime.torch.region_instance import BoundRegion, RegionRunner


@dataclass(frozen=True, slots=True)
class CachedProgram:
    """A program with a cache in a compute dtype.

    Attributes:
        program: See `vlmbuild.kv_cache.program`.
        bound: Its regions by name; unchanged regions are the model's own.
    """

    program: Program
    bound: Mapping[str, RegionRunner]


class ProgramModel(TrainerConventions, GenerationHooks):
    """A program bound to weights.

    Attributes:
        program: After its passes.
        family: Family of the program.
        config: Config of transformers.
        processor: Processor of the model; batches are checked against its pixel limits.
        vocabulary: Number of logits of a token.
        bound: The program's regions in the compute dtype, by name.
    """

    program: Program
    family: Family
    config: Any
    processor: Any
    vocabulary: int
    bound: dict[str, BoundRegion]
    _dtype: torch.dtype
    _cached: dict[CacheForm, CachedProgram]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self._dtype

    def cached(self, form: CacheForm) -> CachedProgram:
        """Return its program with a key-value cache; derived once.

        Compilers expect any size of a dynamic cache, and always the same sizes of a static one.
        """
        if form not in self._cached:
            program = with_cache(self.program, form)
            bound = {
                name: self.bound[name]
                if form == "dynamic" and region is self.program.regions.get(name)
                else BoundRegion(region, self.dtype, one_token=form == "static")
                for name, region in program.regions.items()
            }
            self._cached[form] = CachedProgram(program, bound)
        return self._cached[form]

    def use_cached(self, form: CacheForm, cached: CachedProgram) -> None:
        """Use another program with a key-value cache."""
        self._cached[form] = cached
