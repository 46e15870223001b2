"""Parameters over several processes: FSDP2 by region instance, and whole tensors from sharded ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor, detached, contiguous and on the CPU; gathered from all processes if it is sharded."""
    found: Any = tensor.detach()
    if isinstance(found, DTensor):
        found = found.full_tensor()
    plain: torch.Tensor = found.cpu().contiguous()
    return plain
