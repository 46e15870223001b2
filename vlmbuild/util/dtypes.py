"""Dtypes that weights and activations have, and their names in options."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return a dtype's name in options: "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")
