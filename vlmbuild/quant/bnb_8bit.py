"""The on-disk layout of bitsandbytes 8-bit weights: int8 rows, a float32 scale for each, and a number for the format.

`weight * SCB / 127` is the weight. A checkpoint that transformers has saved holds these tensors for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from vlmbuild.artifact.weights_writer import TensorSpec
from vlmbuild.errors import SourceError, UsageError

ROW_FORMAT: Final = 0
"""The value of `weight_format`: rows in order, the only layout that is left."""
GROUP_VALUES: Final = 2**20
"""How many values are converted at a time: what is needed beside the result is a few times that."""
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


def stored_specs(module: str, shape: Sequence[int]) -> tuple[TensorSpec, ...]:
    """The tensors of a linear layer's `[out, in]` weight: `MODULE.weight`, `MODULE.SCB`, `MODULE.weight_format`.

    The last is one number, `ROW_FORMAT`. Raises UsageError for a shape that is not that of a linear layer.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise UsageError(
            f"The weight of {module} has the shape {tuple(shape)}, which cannot be quantized to 8 bits. Wanted [out, "
            "in], not empty."
        )
    return (
        TensorSpec(f"{module}.weight", torch.int8, (shape[0], shape[1])),
        TensorSpec(f"{module}.SCB", torch.float32, (shape[0],)),
        TensorSpec(f"{module}.weight_format", torch.uint8, ()),
    )


def quantize_rows(values: torch.Tensor, *, name: str = "the weight") -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 `[rows, in]` and float32 `[rows]` tensors of float `[rows, in]` values: bitsandbytes' own bytes.

    A row's result depends on that row alone. Like bitsandbytes this goes through float16, whatever the dtype is; to
    have transformers' bytes, values are first in the dtype that the model is loaded with.

    Raises SourceError, with `name`, for values that are not float rows, that hold NaN or infinity, or that float16
    does not hold.
    """
    if values.dtype not in _FLOATS or values.ndim != 2 or 0 in values.shape[1:]:
        raise SourceError(
            f"The tensor {name} is {values.dtype} {tuple(values.shape)}, which cannot be quantized to 8 bits. Add it "
            "to the skip list."
        )
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes; a dependency of quantized builds only)

    weight = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    scales = torch.empty(values.shape[0], dtype=torch.float32, device=values.device)
    for group in _groups(values):
        half = values[group].to(torch.float16).contiguous()
        _check_finite(values[group], half, name)
        weight[group], scales[group], _ = torch.ops.bitsandbytes.int8_vectorwise_quant(half)
    # A row of zeros is 0 * infinity there, and what NaN is as an integer is the processor's choice.
    weight[scales == 0] = 0
    return weight, scales


def _check_finite(values: torch.Tensor, half: torch.Tensor, name: str) -> None:
    if torch.isfinite(torch.stack(torch.aminmax(half))).all():
        return
    if torch.isfinite(values).all():
        raise SourceError(
            f"The tensor {name} holds values beyond ±65504, the range of float16, which 8-bit quantization goes "
            "through. Add it to the skip list."
        )
    raise SourceError(f"The tensor {name} holds NaN or infinity. Repair the checkpoint, or add it to the skip list.")


def dequantize_rows(
    weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, *, name: str = "the weight"
) -> torch.Tensor:
    """The `[rows, in]` values in `dtype`, as `model.dequantize()` of transformers has them: by way of float32.

    Args:
        weight: int8 `[rows, in]`.
        scales: float32 `[rows]`.
        dtype: float32, float16 or bfloat16.

    Raises SourceError, with `name`, for tensors that are not such, or scales that are not finite and positive or 0;
    UsageError for another dtype.
    """
    if dtype not in _FLOATS:
        raise UsageError(f"Weights cannot be dequantized to {dtype}. Choose from {', '.join(map(str, _FLOATS))}.")
    _check_stored(weight, scales, name)
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes; a dependency of quantized builds only)

    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for group in _groups(weight):
        values[group] = torch.ops.bitsandbytes.int8_vectorwise_dequant(weight[group], scales[group])
    return values


def _check_stored(weight: torch.Tensor, scales: torch.Tensor, name: str) -> None:
    problem = ""
    if weight.dtype != torch.int8 or weight.ndim != 2:
        problem = f"it is {weight.dtype} {tuple(weight.shape)}, not int8 rows"
    elif scales.dtype != torch.float32 or tuple(scales.shape) != (weight.shape[0],):
        problem = f"its scales are {scales.dtype} {tuple(scales.shape)}, not one float32 number for each row"
    elif not (torch.isfinite(scales) & (scales >= 0)).all():
        problem = "a scale is negative, NaN or infinity"
    if problem:
        raise SourceError(f"The 8-bit tensor {name} cannot be used: {problem}. Quantize the checkpoint again.")


def _groups(values: torch.Tensor) -> Iterator[slice]:
    step = max(1, GROUP_VALUES // max(1, values.shape[1]))
    return (slice(start, start + step) for start in range(0, values.shape[0], step))
