"""The part of a model that running its program needs: the program, its regions and weights, and forms with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from vlmbuild.adapters.lora import AdapterSpec
from vlmbuild.errors import UsageError
from vlmbuild.ir.program import Call, Program
from vlmbuild.kv_cache.block import CacheForm
from vlmbuild.kv_cache.program import with_cache
from vlmbuild.runtime.compiler import Compiler
from vlmbuild.runtime.hf import Model, TrainerHooks
from vlmbuild.runtime.torch.checkpointing import Checkpointing
from vlmbuild.runtime.torch.modules import EMBEDDINGS, HEAD, Embeddings, Head, module_at
from vlmbuild.runtime.torch.region import BoundRegion, Embed, RegionRunner
from vlmbuild.runtime.torch.state import add_state_hooks

LORA_DROPOUT = "lora_dropout"
"""Name of the module that stands for the dropout of an adapter."""
_DERIVING = RLock()
"""Held while a program with a cache is derived: threads may generate at once."""


@dataclass(frozen=True, slots=True)
class CachedProgram:
    """A program with a cache in a compute dtype.

    Attributes:
        program: See `vlmbuild.kv_cache.program`.
        bound: Its regions by name; unchanged regions are the model's own.
    """

    program: Program
    bound: Mapping[str, RegionRunner]


class ProgramModel(Model, TrainerHooks):
    """A program bound to weights.

    Attributes:
        program: After its passes.
        vocabulary: Number of logits of a token.
        resized: Whether its tables have other rows than its artifact's.
        bound: The program's regions in the compute dtype, by name.
        adapter: The adapter on it, if any.
        checkpointing: The blocks that are recomputed in backward, if any.
    """

    program: Program
    vocabulary: int
    bound: dict[str, BoundRegion]
    _dtype: torch.dtype
    _cached: dict[CacheForm, CachedProgram]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.adapter: AdapterSpec | None = None
        self.resized = False
        self.checkpointing: Checkpointing | None = None
        self._adapter_disabled = False
        add_state_hooks(self)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self._dtype

    def get_input_embeddings(self) -> Embeddings:
        """Return the module that holds the table of token embeddings."""
        module = self.get_submodule(self.family.language_prefix + EMBEDDINGS)
        assert isinstance(module, Embeddings)
        return module

    def get_output_embeddings(self) -> Head:
        """Return the head: `weight` (vocabulary, hidden) and `bias`."""
        head = self.get_submodule(HEAD)
        assert isinstance(head, Head)
        if not hasattr(head, "bias"):
            head.register_parameter("bias", None)
        return head

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Register every tied parameter under its second name; transformers' options change nothing."""
        for alias, name in self.program.ties.items():
            path, _, leaf = alias.rpartition(".")
            module_at(self, path).register_parameter(leaf, self.get_parameter(name))

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of all parameters that take a gradient."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def cached(self, form: CacheForm) -> CachedProgram:
        """Return its program with a key-value cache; derived once.

        Compilers expect any size of a dynamic cache, and always the same sizes of a static one.
        """
        with _DERIVING:
            if form not in self._cached:
                program = with_cache(self.program, form)
                bound = {
                    name: self.bound[name]
                    if form == "dynamic" and region is self.program.regions.get(name)
                    else BoundRegion(region, self.dtype, fixed=form == "static")
                    for name, region in program.regions.items()
                }
                self._cached[form] = CachedProgram(program, bound)
                self.set_adapter_disabled(self._adapter_disabled)
            return self._cached[form]

    def set_adapter_disabled(self, disabled: bool) -> None:
        """Compute without the adapter, or with it."""
        self._adapter_disabled = disabled
        for bound in (self.bound, *(cached.bound for cached in self._cached.values())):
            for region in bound.values():
                if isinstance(region, BoundRegion):
                    region.adapter_disabled = disabled

    def follow_dropout(self) -> None:
        """Leave the adapter's dropout out where others have turned it off (TRL's `disable_dropout`).

        Raises:
            UsageError: They have given it another probability, which graphs hold as a constant.
        """
        dropout = self._modules.get(LORA_DROPOUT)
        if not isinstance(dropout, nn.Dropout) or self.adapter is None:
            return
        built = _dropout(self.adapter)
        if dropout.p not in (0, built):
            raise UsageError(
                f"{LORA_DROPOUT}.p is {dropout.p}, and the graph of the adapter has {built}. Pass dropout={dropout.p} to "
                "vlmbuild.add_lora, or set it to 0."
            )
        for region in self.bound.values():
            region.dropout_disabled = not dropout.p

    def register_dropout(self) -> None:
        """Show the adapter's dropout as the module that trainers look for; it has no tensors, and is never called."""
        probability = 0.0 if self.adapter is None else _dropout(self.adapter)
        if not probability:
            self._modules.pop(LORA_DROPOUT, None)
        elif LORA_DROPOUT not in self._modules:
            self.add_module(LORA_DROPOUT, nn.Dropout(probability))

    def use_cached(self, form: CacheForm, cached: CachedProgram) -> None:
        """Use another program with a key-value cache."""
        self._cached[form] = cached

    def run_call(
        self,
        call: Call,
        runner: RegionRunner,
        compiler: Compiler,
        activations: tuple[Tensor, ...],
        embed: Embed,
    ) -> tuple[Tensor, ...]:
        """Run a call: a part between blocks reads the model's tensors, a block its instance's.

        Where the table of embeddings has hooks, its rows come from `embed`, which calls its module.
        """
        results: tuple[Tensor, ...]
        if not call.instance:
            embeddings = self.get_input_embeddings()
            if isinstance(runner, BoundRegion) and runner.embeds and embeddings.has_hooks:
                results = runner.run_with(self, activations, embeddings.weight, embed)
            else:
                results = runner(self, compiler, activations)
            return results
        instance = module_at(self, call.instance)
        if (
            isinstance(runner, BoundRegion)
            and self.checkpointing is not None
            and self.training
            and torch.is_grad_enabled()
            and self.checkpointing.covers(call.instance)
        ):
            results = self.checkpointing.run(instance, runner, compiler, activations)
        else:
            results = instance(*activations, runner=runner, compiler=compiler)
        return results


def _dropout(adapter: AdapterSpec) -> float:
    """Return the highest probability of an adapter's layers."""
    return max((lora.dropout for lora in adapter.loras.values()), default=0.0)
