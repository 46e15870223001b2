"""Shapes that the rotation takes."""

from __future__ import annotations

from torch import Tensor

from vlmbuild.errors import UsageError


def check_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise UsageError unless the tables fit query and key, as in `rotate_reference`."""
    for name, x in (("query", query), ("key", key)):
        rows = (x.shape[0], *x.shape[2:-1])
        if x.dim() not in (3, 4) or cos.shape != sin.shape or tuple(cos.shape) != (*rows, x.shape[-1] // 2):
            raise UsageError(
                f"mrope_rotate: {name} of shape {tuple(x.shape)} does not fit cos {tuple(cos.shape)} and sin "
                f"{tuple(sin.shape)}; wanted [B, H, S, D] with [B, S, D/2], or [N, H, D] with [N, D/2]"
            )
        if x.shape[-1] % 2:
            raise UsageError(f"mrope_rotate: the head dimension of {name} is odd ({x.shape[-1]})")
