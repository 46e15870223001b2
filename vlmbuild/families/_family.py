"""What a model family tells the builder: the one place where a family's name and habits may appear."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlmbuild.program import Geometry, Input, Role


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A batch after the host prologue, packed: the tokens of all samples in one row, without padding.

    Attributes:
        variant: Which variant of the program runs it.
        tensors: That variant's inputs.
        places: Where each packed token stood in the flattened (batch, sequence) input ids.
    """

    variant: str
    tensors: dict[str, Tensor]
    places: Tensor


class KeyGroups(NamedTuple):
    """What a query of an attention layer sees, by groups of keys; a core module hands it to transformers as the attention
    mask, and capture to the operator.

    Attributes:
        key_groups: int32 (keys,), the group of every key.
        visible_groups: bool (queries, groups).
    """

    key_groups: Tensor
    visible_groups: Tensor


def cumulative_bounds(lengths: Tensor) -> Tensor:
    """Bounds of packed sequences (`cu_seqlens`, int32): 0, the ends, and the last end again.

    The repetition is an empty sequence. With it there are never fewer than three bounds, and one sequence is no special
    case that a compiler would specialise.
    """
    ends = lengths.cumsum(0)
    return torch.cat([ends.new_zeros(1), ends, ends[-1:]]).to(torch.int32)


class Family(Protocol):
    """A family of models with one config class, one prologue and one set of names."""

    @property
    def name(self) -> str:
        """Key in `FAMILIES`, and the family's name in stored programs."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """Values of `architectures` in config.json that this family reads."""

    def config(self, values: Mapping[str, Any]) -> Any:
        """The transformers config object for the values of a config.json; runs no code that the values name.

        Raises:
            SourceError: A value has the wrong type or contradicts another.
        """

    def geometry(self, config: Any) -> Geometry:
        """What passes may know."""

    def variants(self, config: Any) -> dict[str, tuple[Input, ...]]:
        """The inputs of every variant."""

    def module(self, config: Any, variant: str, attention: str) -> nn.Module:
        """The module to trace, on the meta device, in `COMPUTE_DTYPE`, with parameters named as transformers names them.

        Args:
            config: From `config`.
            variant: A key of `variants`; the module takes its inputs as keyword arguments and returns logits.
            attention: Name of the attention implementation registered with transformers.
        """

    def ties(self, config: Any) -> dict[str, str]:
        """Alias -> parameter for tensors that share storage."""

    def constants(self, config: Any) -> dict[str, Tensor]:
        """Tensors that follow from the config (rotary frequencies), by module name."""

    def role(self, name: str) -> Role:
        """What a parameter of this (module) name does."""

    def stored_name(self, name: str) -> str:
        """Module name -> name in published checkpoint files."""

    def module_name(self, stored: str) -> str:
        """Name in a checkpoint file, published or as newer versions write it -> module name."""

    def prepare(self, batch: Mapping[str, Tensor], config: Any) -> HostBatch:
        """The host prologue: everything that depends on data, as tensors, and the checks that name a bad sample.

        Raises:
            BatchError: The batch contradicts itself.
        """

    def processor(self, directory: Path) -> Any:
        """The processor of a checkpoint or artifact directory; works without torchvision.

        Raises:
            SourceError: A processor file is missing or unreadable.
        """


def meta_module(model_class: Any, config: Any, attention: str, dtype: torch.dtype) -> Any:
    """A transformers model on the meta device whose attention goes through our registered implementation. It has a config of
    its own: the caller's may be shared with a model that runs."""
    with torch.device("meta"):
        model = model_class._from_config(deepcopy(config), dtype=dtype, attn_implementation="eager")
    # transformers refuses to construct a model with an implementation named "flash" that is not a kernel package
    for part in (model.config, *(getattr(model.config, key) for key in model.config.sub_configs)):
        part._attn_implementation = attention
    return model.eval()
