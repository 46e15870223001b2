"""8-bit weights in bitsandbytes' layout (LLM.int8, arXiv:2208.07339, section 3): int8 rows with a float32 scale for each.

`weight * SCB / 127` is the weight. A third tensor, one number, says that rows lie in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.formats import (
    Buffer,
    OperatorCall,
    PackedWeight,
    QuantizedSource,
    RoundedChunk,
    StaticShape,
    WeightFormat,
    ranges,
    unfit,
)
from vlmbuild.util.lazy import LazyModule
from vlmbuild.util.validation import is_finite, number, require_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.fx import Node

    from vlmbuild.artifact import weights_writer
    from vlmbuild.artifact.weights_reader import CheckpointWeights
    from vlmbuild.artifact.weights_writer import TensorSpec
    from vlmbuild.quant import ort_matmul
else:
    torch, ort_matmul = LazyModule("torch"), LazyModule("vlmbuild.quant.ort_matmul")
    weights_writer = LazyModule("vlmbuild.artifact.weights_writer")

ROW_FORMAT: Final = 0
"""The value of `weight_format`: rows in order, the only layout in use."""
GROUP_VALUES: Final = 2**20
"""Values that are converted at a time; scratch memory is a few times that."""
ONNX_BLOCK: Final = 32
"""Columns that share a scale in an ONNX model, where all blocks of a row have the row's scale."""


@dataclass(frozen=True, slots=True)
class Int8(WeightFormat):
    """One signed byte a weight, with one scale for each row.

    Attributes:
        threshold: Columns of the input with a value above it are multiplied in 16 bits; 0 for none.
    """

    threshold: float = 6.0

    name: ClassVar[str] = "int8"
    targets: ClassVar[tuple[str, ...]] = ("trainable", "onnx", "aoti")
    looked_up: ClassVar[bool] = True
    marker: ClassVar[str] = ".SCB"
    shared: ClassVar[tuple[str, ...]] = ("threshold",)

    def __post_init__(self) -> None:
        threshold = number(self.threshold, "threshold")
        if threshold < 0:
            raise UsageError(f"threshold must not be negative; got {self.threshold!r}.")
        object.__setattr__(self, "threshold", threshold)

    def bits(self, shape: StaticShape) -> int:
        return 8 * math.prod(shape) + 32 * shape[0]

    def describe(self, target: str = "trainable") -> str:
        return f"int8, outliers above {self.threshold}" if self.threshold and target != "onnx" else "int8"

    def parts(self, module: str, shape: StaticShape, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        if len(shape) != 2 or min(shape) < 1:
            raise UsageError(
                f"The weight of {module} has the shape {tuple(shape)}, which cannot be quantized to 8 bits. Add it to the "
                "skip list."
            )
        return (
            weights_writer.TensorSpec(f"{module}.weight", torch.int8, shape),
            weights_writer.TensorSpec(f"{module}.SCB", torch.float32, shape[:1]),
            weights_writer.TensorSpec(f"{module}.weight_format", torch.uint8, ()),
        )

    def encode(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[tuple[str, Tensor]]:
        for chunk in chunks:
            rows, scales = quantize_rows(chunk.view(-1, shape[1]), name=name)
            yield ".weight", rows
            yield ".SCB", scales
        yield ".weight_format", torch.tensor(ROW_FORMAT, dtype=torch.uint8)

    @classmethod
    def check(cls, weights: CheckpointWeights, module: str, config: Mapping[str, Any]) -> QuantizedSource:
        name = f"{module}.weight"
        info, scales = weights.tensors.get(name), weights.tensors[f"{module}.SCB"]
        suffixes: tuple[str, ...] = (".weight", ".SCB")
        if info is None or info.dtype != torch.int8 or len(info.shape) != 2:
            raise unfit(weights, name, "it is not a matrix of int8, as its SCB says")
        if scales.dtype != torch.float32 or math.prod(scales.shape) != info.shape[0]:
            raise unfit(weights, name, f"{module}.SCB does not have one float32 for each of its {info.shape[0]} rows")
        if f"{module}.weight_format" in weights.tensors:
            suffixes = (*suffixes, ".weight_format")
            if weights.read(f"{module}.weight_format").flatten().tolist() != [ROW_FORMAT]:
                raise unfit(weights, name, "it is laid out for a GPU's tiles, not by rows")
        return QuantizedSource(cls(threshold_of(config)), torch.float16, info.shape, suffixes)

    def decode(
        self, weights: CheckpointWeights, module: str, shape: StaticShape, dtype: torch.dtype, step: int
    ) -> Iterator[Tensor]:
        columns, total, name = shape[1], math.prod(shape), f"{module}.weight"
        scales, step = weights.read(f"{module}.SCB").flatten(), max(1, step // columns) * columns
        for first, count in ranges(total, step):
            rows = weights.read_part(name, first, count).view(-1, columns)
            group = scales[first // columns :][: len(rows)]
            yield dequantize_rows(rows, group, dtype, name=name).flatten()

    def config_entries(self) -> dict[str, Any]:
        return {"load_in_8bit": True, "llm_int8_threshold": self.threshold}

    def buffers(self, shape: StaticShape) -> dict[str, Buffer]:
        return {"": Buffer(torch.int8, shape), "_scb": Buffer(torch.float32, shape[:1])}

    def call(self, shape: StaticShape, input: Node, stored: Mapping[str, Node], bias: Any) -> OperatorCall:
        return torch.ops.vlmbuild.linear_8bit.default, (input, stored[""], stored["_scb"], bias, self.threshold)

    def load(self, weights: CheckpointWeights, module: str, shape: StaticShape) -> dict[str, Tensor]:
        return {"": weights.map(f"{module}.weight"), "_scb": weights.map(f"{module}.SCB").flatten()}

    def onnx_weight(self, shape: StaticShape, dtype: torch.dtype, name: str) -> PackedWeight:
        """Return MatMulNBits' weight in blocks; it has no outlier columns, and rounds inputs to 8 bits."""
        return ort_matmul.matmul_nbits(8, ONNX_BLOCK, ort_matmul.INTEGER, shape, dtype)

    def encode_onnx(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[RoundedChunk]:
        for chunk in chunks:
            rows = chunk.view(-1, shape[1])
            parts = pack_onnx(*quantize_rows(rows, name=name), dtype)
            yield RoundedChunk(rows, ort_matmul.unpacked_rows(8, parts, shape[1]), parts)


def pack_onnx(values: Tensor, scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert int8 [rows, in] to MatMulNBits' parts: codes shifted by 128, and the row's scale for each block."""
    blocks = ort_matmul.in_blocks(values, ONNX_BLOCK)
    codes = (blocks.int() + 128).to(torch.uint8)
    return {"": codes, "_scales": (scales / 127).to(dtype).repeat_interleave(blocks.shape[1])}


def threshold_of(config: Mapping[str, Any]) -> float:
    """Read the outlier threshold of a `quantization_config`."""
    value = config.get("llm_int8_threshold", 6.0)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 6.0


def quantize_rows(values: Tensor, *, name: str = "the weight") -> tuple[Tensor, Tensor]:
    """Quantize float [rows, in] to int8 [rows, in] and float32 scales [rows], to bitsandbytes' own bytes.

    A row's result depends on that row alone. Like bitsandbytes this goes through float16, whatever the dtype is; to have
    transformers' bytes, convert values first to the dtype that the model is loaded with.

    Raises:
        SourceError: Values are NaN or infinite, or float16 does not hold them; `name` is in the message.
    """
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes; a dependency of quantized builds only)

    weight = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    scales = torch.empty(values.shape[0], dtype=torch.float32, device=values.device)
    for group in _groups(values):
        half = values[group].to(torch.float16).contiguous()
        if not is_finite(half):
            require_finite(values[group], f"The tensor {name}")
            raise SourceError(
                f"The tensor {name} holds values beyond ±65504, the range of float16, which 8-bit quantization goes "
                "through. Add it to the skip list."
            )
        weight[group], scales[group], _ = torch.ops.bitsandbytes.int8_vectorwise_quant(half)
    # A row of zeros is 0 * infinity there, and what NaN is as an integer is the processor's choice.
    weight[scales == 0] = 0
    return weight, scales


def dequantize_rows(weight: Tensor, scales: Tensor, dtype: torch.dtype, *, name: str = "the weight") -> Tensor:
    """Dequantize int8 rows with a float32 scale each, by way of float32, as `model.dequantize()` of transformers does.

    Raises SourceError with `name` for a scale that is negative or not finite.
    """
    if not (torch.isfinite(scales) & (scales >= 0)).all():
        raise SourceError(
            f"The 8-bit tensor {name} cannot be used: a scale is negative, NaN or infinity. Quantize the checkpoint again."
        )
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes; a dependency of quantized builds only)

    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for group in _groups(weight):
        values[group] = torch.ops.bitsandbytes.int8_vectorwise_dequant(weight[group], scales[group])
    return values


def _groups(values: Tensor) -> Iterator[slice]:
    step = max(1, GROUP_VALUES // max(1, values.shape[1]))
    return (slice(start, start + step) for start in range(0, values.shape[0], step))
