"""Formats of the target compressed-tensors, rounded and packed by the library of that name: 4-bit integers in groups of a
row, 8-bit integers and 8-bit floats by row. `vlmbuild.quant.compressed_tensors` reads them back."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from vlmbuild.errors import IncompatibleError, UsageError
from vlmbuild.formats import RoundedChunk, StaticShape, WeightFormat
from vlmbuild.quant.compressed_tensors import stored_values
from vlmbuild.quant.dequantized import sharing
from vlmbuild.util.lazy import LazyModule
from vlmbuild.util.validation import one_of, require_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlmbuild.artifact import weights_writer
    from vlmbuild.artifact.weights_reader import CheckpointWeights
    from vlmbuild.artifact.weights_writer import TensorSpec
else:
    torch = LazyModule("torch")
    weights_writer = LazyModule("vlmbuild.artifact.weights_writer")

GROUP_SIZES: Final = (32, 64, 128)
"""Columns that may share a scale: vLLM's kernels have no smaller groups."""
CLIPPED: Final = (1.0, 0.9, 0.8)
"""Shares of a group's range that are tried; values beyond are clipped. Of normally distributed weights the error falls from
11.1 to 10.2 %; twenty shares would give 10.1."""


def library() -> Any:
    """Import compressed-tensors.

    Raises:
        IncompatibleError: It is not installed, or does not start.
    """
    try:
        return importlib.import_module("compressed_tensors")
    except ImportError as error:
        raise IncompatibleError(
            f"The target compressed-tensors needs the library of that name, which cannot be imported: {error}. Install it "
            "with `pip install 'vlmbuild[compressed-tensors]'`."
        ) from error


class CompressedFormat(WeightFormat):
    """Base of the formats.

    Attributes:
        preset: Name of the library's scheme.
        stored: Suffix of the tensor with the numbers.
    """

    __slots__ = ()

    targets: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    preset: ClassVar[str]
    stored: ClassVar[str] = ".weight"
    packed_bits: ClassVar[int] = 0

    def layout(self, shape: StaticShape) -> str:
        """Return the name that `vlmbuild.quant.compressed_tensors` gives to such weights in a source."""
        raise NotImplementedError

    def width(self, shape: StaticShape) -> int:
        """Return the columns that share a scale."""
        return shape[1]

    def scheme(self, modules: list[str]) -> Any:
        """Return the library's scheme for modules: names, or the class "Linear"."""
        library()
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.preset, modules)
        scheme.format = infer_module_format(torch.nn.Linear, scheme)
        return scheme

    def bits(self, shape: StaticShape) -> int:
        """Count the bits, with scales in 16 bits."""
        return (self.packed_bits or 8) * math.prod(shape) + 16 * shape[0] * (shape[1] // self.width(shape))

    def parts(self, module: str, shape: StaticShape, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        if len(shape) != 2 or min(shape) < 1 or shape[1] % self.width(shape):
            raise UsageError(
                f"The weight of {module} has the shape {tuple(shape)}, which cannot be stored as {self.describe()}. Add it to "
                "the skip list."
            )
        scales = (shape[0], shape[1] // self.width(shape))
        return (
            self._numbers(module, shape),
            weights_writer.TensorSpec(f"{module}.weight_scale", dtype, scales),
        )

    def _numbers(self, module: str, shape: StaticShape) -> TensorSpec:
        raise NotImplementedError

    def encode_rounded(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[RoundedChunk]:
        from compressed_tensors.quantization.lifecycle.forward import quantize

        args = self.scheme(["Linear"]).weights
        for chunk in chunks:
            rows = chunk.view(-1, shape[1]).float()
            require_finite(rows, f"The tensor {name}")
            scales = self._scales(rows, args, dtype)
            numbers = quantize(rows, scales, None, args, args.pytorch_dtype())
            wide = scales.float().repeat_interleave(self.width(shape), dim=1)
            yield RoundedChunk(
                rows, numbers.float() * wide, {self.stored: self._pack(numbers), ".weight_scale": scales}
            )

    def encode(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[tuple[str, Tensor]]:
        for chunk in self.encode_rounded(chunks, shape, dtype, name):
            yield from chunk.parts.items()

    def _scales(self, rows: Tensor, args: Any, dtype: torch.dtype) -> Tensor:
        """Return the library's scales of float32 rows, one for each group, rounded to the dtype that stores them."""
        from compressed_tensors.quantization.utils import calculate_qparams

        groups = rows.unflatten(1, (-1, self.width(tuple(rows.shape))))
        scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        return _stored_scales(scales, dtype)

    def _pack(self, numbers: Tensor) -> Tensor:
        return numbers

    def load(self, weights: CheckpointWeights, module: str, shape: StaticShape) -> dict[str, Tensor]:
        return {"": stored_values(weights, module, shape, self.packed_bits, self.width(shape))}


@dataclass(frozen=True, slots=True)
class W4A16(CompressedFormat):
    """Eight integers in a word of 32 bits, with a scale for each group of a row.

    Attributes:
        group_size: Weights of a row per scale; layers whose rows are no multiple get the largest of 64 and 32 that fits.
    """

    group_size: int = 128

    name: ClassVar[str] = "w4a16"
    preset: ClassVar[str] = "W4A16"
    stored: ClassVar[str] = ".weight_packed"
    packed_bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        one_of("group_size of w4a16", self.group_size, GROUP_SIZES)

    def describe(self, target: str = "compressed-tensors") -> str:
        return f"w4a16, groups of {self.group_size}"

    def layout(self, shape: StaticShape) -> str:
        return f"4 bits, {sharing(shape, (1, self.group_size))}"

    def width(self, shape: StaticShape) -> int:
        return self.group_size

    def fitted(self, shape: StaticShape) -> Self | None:
        sizes = [size for size in GROUP_SIZES if size <= self.group_size and shape[1] % size == 0]
        return replace(self, group_size=max(sizes)) if sizes else None

    def scheme(self, modules: list[str]) -> Any:
        scheme = CompressedFormat.scheme(self, modules)
        scheme.weights.group_size = self.group_size
        return scheme

    def parts(self, module: str, shape: StaticShape, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        sizes = weights_writer.TensorSpec(f"{module}.weight_shape", torch.int64, (2,))
        return (*CompressedFormat.parts(self, module, shape, dtype), sizes)

    def _numbers(self, module: str, shape: StaticShape) -> TensorSpec:
        return weights_writer.TensorSpec(f"{module}.weight_packed", torch.int32, (shape[0], shape[1] // 8))

    def encode_rounded(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[RoundedChunk]:
        sizes = {".weight_shape": torch.tensor(shape)}
        for chunk in CompressedFormat.encode_rounded(self, chunks, shape, dtype, name):
            yield chunk._replace(parts={**chunk.parts, **sizes})
            sizes = {}

    def _scales(self, rows: Tensor, args: Any, dtype: torch.dtype) -> Tensor:
        """Return for each group the scale, of those of `CLIPPED`, with which its values are rounded best."""
        whole = CompressedFormat._scales(self, rows, args, torch.float32)
        groups = rows.unflatten(1, (-1, self.group_size))
        tried = [_stored_scales(whole * share, dtype) for share in CLIPPED]
        best = torch.stack([_squares(groups, scales.float()[..., None]) for scales in tried]).argmin(0, keepdim=True)
        return torch.stack(tried).gather(0, best)[0]

    def _pack(self, numbers: Tensor) -> Tensor:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        packed: Tensor = pack_to_int32(numbers, self.packed_bits)
        return packed


@dataclass(frozen=True, slots=True)
class W8A8(CompressedFormat):
    """One signed byte a weight, with one scale for each row; inputs are rounded to 8 bits, token by token, when it runs."""

    name: ClassVar[str] = "w8a8"
    preset: ClassVar[str] = "W8A8"
    input_error: ClassVar[float] = 9e-3

    def describe(self, target: str = "compressed-tensors") -> str:
        return "w8a8, one scale a row"

    def layout(self, shape: StaticShape) -> str:
        return "8 bits, one scale a row"

    def _numbers(self, module: str, shape: StaticShape) -> TensorSpec:
        return weights_writer.TensorSpec(f"{module}.weight", torch.int8, shape)


@dataclass(frozen=True, slots=True)
class FP8(CompressedFormat):
    """One 8-bit float (e4m3) a weight, with one scale for each row; inputs are rounded alike, token by token, when it runs."""

    name: ClassVar[str] = "fp8"
    preset: ClassVar[str] = "FP8_DYNAMIC"
    input_error: ClassVar[float] = 2.6e-2

    def describe(self, target: str = "compressed-tensors") -> str:
        return "fp8, one scale a row"

    def layout(self, shape: StaticShape) -> str:
        return "8-bit floats, one scale a row"

    def _numbers(self, module: str, shape: StaticShape) -> TensorSpec:
        return weights_writer.TensorSpec(f"{module}.weight", torch.float8_e4m3fn, shape)


def _stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to a dtype; where one would become zero, its numbers are zero with any other."""
    stored = scales.to(dtype)
    return torch.where(stored == 0, torch.finfo(dtype).eps, stored)


def _squares(groups: Tensor, scales: Tensor) -> Tensor:
    """Return the squared error of each group [rows, groups, size] with 4-bit numbers, summed in an order that does not
    depend on the processor; a size is a power of two."""
    errors = (groups / scales).round_().clamp_(-8, 7).mul_(scales).sub_(groups).square_()
    while errors.shape[-1] > 1:
        first, second = errors.chunk(2, dim=-1)
        errors = first + second
    return errors.squeeze(-1)
