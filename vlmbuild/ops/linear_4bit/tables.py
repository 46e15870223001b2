"""The values that 4-bit weights and 8-bit scales index, as bitsandbytes has them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def code_4bit(quant_type: str, device: torch.device) -> Tensor:
    """Return the 16 float32 values of "nf4" or "fp4"."""
    from bitsandbytes.functional import get_4bit_type

    code: Tensor = get_4bit_type(quant_type, device=torch.device("cpu"))  # type: ignore[no-untyped-call]
    return code.to(device)


@cache
def code_8bit(device: torch.device) -> Tensor:
    """Return the 256 float32 values that double-quantized scales index."""
    from bitsandbytes.functional import create_dynamic_map

    code: Tensor = create_dynamic_map().to(device)  # type: ignore[no-untyped-call]
    return code
