"""Run a program in float32, with the weights of one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmbuild.families import Family
from vlmbuild.ir.interpret import run_calls
from vlmbuild.ir.program import Call, Program, Region, Variant
from vlmbuild.kv_cache.program import MASK, cached_inputs
from vlmbuild.runtime.decode_steps import unpack_to_padded, whole_mask
from vlmbuild.runtime.torch.region import BoundRegion

State = dict[str, Tensor]
"""Values by the names that a variant has for them."""


class SlotWeights(Protocol):
    """Weights of an artifact under the program's names, as stored: quantized ones dequantized."""

    def slots(self, region: Region, instance: str, constants: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors of an instance's slots in float32; `constants` are tensors that follow from the config."""


class Reference:
    """A program with a key-value cache (`with_cache`), and the weights that it reads block by block.

    Attributes:
        program: The program.
    """

    def __init__(self, program: Program, family: Family, config: Any, weights: SlotWeights) -> None:
        self.program = program
        self._family, self._config, self._weights = family, config, weights
        self._constants = family.constants(config)
        self._bound = {name: BoundRegion(region, torch.float32, ()) for name, region in program.regions.items()}

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[str, State]:
        """Return the variant of a batch, which has one row a sample, and its inputs with an empty cache."""
        prepared = self._family.prepare(batch, self._config)
        variant = self.program.variants[prepared.variant]
        shape = batch["input_ids"].shape
        values = unpack_to_padded(prepared, variant, shape)
        values = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in values.items()}
        values[MASK] = whole_mask(batch.get(MASK), shape[0], shape[1], torch.device("cpu"))
        for entry in cached_inputs(variant):
            values[entry.name] = torch.zeros(shape[0], entry.fixed_size(1), 0, entry.fixed_size(3))
        return prepared.variant, values

    def run(
        self, batch: Mapping[str, Tensor], keep: Callable[[Variant], Collection[str]] = lambda _: ()
    ) -> tuple[str, State]:
        """Run a batch.

        Args:
            batch: The processor's output, with one row a sample.
            keep: Gives names of the variant's values to return too.

        Returns:
            The name of the batch's variant, and its output (batch, sequence, vocabulary), presents and kept values.
        """
        name, values = self.inputs(batch)
        variant = self.program.variants[name]
        (found,) = self.run_together(variant, [values], keep(variant))
        found[variant.output] = found[variant.output].view(*batch["input_ids"].shape, -1)
        return name, found

    @torch.no_grad()
    def run_together(self, variant: Variant, states: Sequence[State], keep: Collection[str] = ()) -> list[State]:
        """Run a variant on several inputs, each by itself; the weights are read once.

        Returns:
            For each, the output as the program has it, the presents and the kept values.
        """
        kept = {variant.output, *variant.presents, *keep}

        def step(call: Call, arguments: tuple[list[Tensor], ...]) -> list[list[Tensor]]:
            region = self.program.regions[call.region]
            tensors = tuple(self._weights.slots(region, call.instance, self._constants))
            bound = self._bound[call.region]
            results = [bound.run(tensors, None, values, training=False) for values in zip(*arguments, strict=True)]
            return [list(column) for column in zip(*results, strict=True)]

        columns = {entry.name: [state[entry.name] for state in states] for entry in variant.inputs}
        run_calls(variant.calls, columns, step, keep=kept)
        return [{name: columns[name][index] for name in kept} for index in range(len(states))]
