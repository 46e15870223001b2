"""A linear layer whose weight a target stores in another format: the mark that quantization leaves, where a target's own
operators multiply by the stored form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = torch.library.Library("vlmbuild", "FRAGMENT")
_LIBRARY.define("linear_packed(Tensor input, Tensor weight, Tensor? bias, str format) -> Tensor")


@torch.library.impl(_LIBRARY, "linear_packed", "CompositeExplicitAutograd")
def linear_packed(input: Tensor, weight: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """Compute `input @ weight.T + bias` with the values [out, in] that the stored weight stands for.

    Args:
        input: [..., in].
        weight: [out, in], dequantized.
        bias: [out].
        format: Storage format of the weight, for people.
    """
    return F.linear(input, weight, bias)


@torch.library.register_fake("vlmbuild::linear_packed", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(input: Tensor, weight: Tensor, bias: Tensor | None, format: str) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))
