"""Linear layers on plain weights: by oneDNN for inference on CPUs, and on weights that a target stores in another format;
lookups in such weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = torch.library.Library("vlmbuild", "FRAGMENT")
_LIBRARY.define("linear_onednn(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define("linear_packed(Tensor input, Tensor weight, Tensor? bias, str format) -> Tensor")
_LIBRARY.define("embedding_packed(Tensor weight, Tensor indices, str format) -> Tensor")
_AVAILABLE = torch.backends.mkldnn.is_available()
_LEAST = 1 << 18
"""Elements of a weight: with fewer, finding oneDNN's kernel takes longer than multiplying."""


@torch.library.impl(_LIBRARY, "linear_onednn", "CompositeExplicitAutograd")
def linear_onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `input @ weight.T + bias` in float32 on a CPU.

    oneDNN has kernels for the widest registers of every processor; the BLAS that torch takes for float32 may be made for
    those of one vendor, and need twice as long on another's. In narrower dtypes torch takes oneDNN itself.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")
    return result


def suits_onednn(states: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN takes a product that torch gives to another BLAS, and is not slower."""
    return (
        _AVAILABLE
        and states.dtype == torch.float32 == weight.dtype
        and states.device.type == "cpu"
        and weight.numel() >= _LEAST
    )


@torch.library.impl(_LIBRARY, "linear_packed", "CompositeExplicitAutograd")
def linear_packed(input: Tensor, weight: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """Compute `input @ weight.T + bias` with the dequantized weight: the mark that quantization leaves where a target's own
    operators multiply by the stored form, whose name `format` is for people."""
    return F.linear(input, weight, bias)


@torch.library.impl(_LIBRARY, "embedding_packed", "CompositeExplicitAutograd")
def embedding_packed(weight: Tensor, indices: Tensor, format: str) -> Tensor:
    """Look rows of the dequantized weight up: the mark of `linear_packed` for embeddings."""
    return F.embedding(indices, weight)


@torch.library.register_fake("vlmbuild::linear_onednn", lib=_LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("vlmbuild::linear_packed", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(input: Tensor, weight: Tensor, bias: Tensor | None, format: str = "") -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.register_fake("vlmbuild::embedding_packed", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(weight: Tensor, indices: Tensor, format: str) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))
