"""Gradient checkpointing of repeated blocks (arXiv:1604.06174): which blocks, and where their inputs are kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from vlmbuild.errors import UsageError
from vlmbuild.runtime.compiler import Compiler
from vlmbuild.runtime.torch.region import BoundRegion


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """The blocks that are recomputed in backward.

    Attributes:
        every: Checkpoint every n-th block of each list; the others keep their activations.
        offload: Keep the blocks' inputs in host memory, pinned if the model is on a GPU, and copy them back for backward. On a
            CPU it costs a copy and saves nothing.
    """

    every: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise UsageError(f"every_n_layers must be a whole number of at least 1, got {self.every!r}.")

    def covers(self, instance: str) -> bool:
        """Return whether it includes the block of this name ("model.language_model.layers.7")."""
        leaf = instance.rpartition(".")[2]
        return bool(instance) and (not leaf.isdigit() or int(leaf) % self.every == 0)

    def run(self, block: nn.Module, runner: BoundRegion, compiler: Compiler, tensors: tuple[Tensor, ...]) -> Any:
        """Call a block, and again in backward, with the same random numbers if it draws any.

        Checkpointing itself saves only the block's inputs, so that hooks on saved tensors move just these.
        """
        storage: AbstractContextManager[Any] = nullcontext()
        if self.offload:
            storage = save_on_cpu(pin_memory=torch.cuda.is_available() and tensors[0].is_cuda)
        with storage:
            options = {"runner": runner, "compiler": compiler}
            return checkpoint(block, *tensors, use_reentrant=False, preserve_rng_state=runner.random, **options)
