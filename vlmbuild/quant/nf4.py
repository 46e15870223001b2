"""4-bit weights in bitsandbytes' layout: 4-bit NormalFloat and FP4 (QLoRA, arXiv:2305.14314, section 3).

Two weights share a byte, and each block of weights a scale. Scales may be stored in 8 bits too, in blocks of 256.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.formats import (
    BLOCK_SIZES,
    NESTED_BLOCKSIZE,
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
from vlmbuild.util.validation import boolean, one_of, require_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.fx import Node

    from vlmbuild.artifact import weights_writer
    from vlmbuild.artifact.weights_reader import CheckpointWeights
    from vlmbuild.artifact.weights_writer import TensorSpec
    from vlmbuild.ir import program
    from vlmbuild.ops.linear_4bit import dequantize
    from vlmbuild.quant import bnb_quantize, bnb_state
    from vlmbuild.quant.bnb_state import QuantState
else:
    torch = LazyModule("torch")
    weights_writer = LazyModule("vlmbuild.artifact.weights_writer")
    program = LazyModule("vlmbuild.ir.program")
    dequantize = LazyModule("vlmbuild.ops.linear_4bit.dequantize")
    bnb_quantize, bnb_state = LazyModule("vlmbuild.quant.bnb_quantize"), LazyModule("vlmbuild.quant.bnb_state")

_STATE = ".weight.quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True)
class FourBit(WeightFormat):
    """The layout that NF4 and FP4 share.

    Attributes:
        blocksize: Weights per scale.
        double_quant: True if the scales are stored in 8 bits, in blocks of 256.
    """

    blocksize: int = 64
    double_quant: bool = True

    targets: ClassVar[tuple[str, ...]] = ("trainable", "onnx", "aoti")

    def __post_init__(self) -> None:
        one_of("blocksize", self.blocksize, BLOCK_SIZES)
        boolean("double_quant", self.double_quant)

    def bits(self, shape: StaticShape) -> int:
        return 8 * sum(math.prod(size) * dtype.itemsize for dtype, size in self._data(shape).values())

    def describe(self, target: str = "trainable") -> str:
        nested = self.double_quant and target != "onnx"
        return f"{self.name}, blocks of {self.blocksize}{', scales in 8 bits' if nested else ''}"

    def chunk_unit(self, shape: StaticShape) -> int:
        return self.blocksize

    def _tensors(self, shape: StaticShape) -> dict[str, Buffer]:
        """Return the packed weight, its scales, and the tables that codes index, by bitsandbytes' names."""
        count = math.prod(shape)
        blocks = math.ceil(count / self.blocksize)
        plain = {
            "": Buffer(torch.uint8, (math.ceil(count / 2), 1)),
            "absmax": Buffer(torch.uint8 if self.double_quant else torch.float32, (blocks,)),
            "quant_map": Buffer(torch.float32, (16,)),
        }
        nested = {
            "nested_absmax": Buffer(torch.float32, (math.ceil(blocks / NESTED_BLOCKSIZE),)),
            "nested_quant_map": Buffer(torch.float32, (256,)),
        }
        return plain | nested if self.double_quant else plain

    def _data(self, shape: StaticShape) -> dict[str, Buffer]:
        """Return the tensors without the tables."""
        return {name: buffer for name, buffer in self._tensors(shape).items() if not name.endswith("quant_map")}

    def parts(self, module: str, shape: StaticShape, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """Return the specs; only the size of the packed state is not exact: it spells out a float."""
        specs = [
            weights_writer.TensorSpec(module + _suffix(name), *buffer) for name, buffer in self._tensors(shape).items()
        ]
        longest = bnb_state.QuantState(
            self.name, self.blocksize, dtype, shape, bnb_state.LONGEST_FLOAT if self.double_quant else None
        )
        state = weights_writer.TensorSpec(
            module + self.marker, torch.uint8, longest.pack().shape, exact=not self.double_quant
        )
        return (*specs, state)

    def encode(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[tuple[str, Tensor]]:
        scales = []
        for chunk in chunks:
            packed, absmax = self._quantize(chunk, name)
            yield ".weight", packed
            scales.append(absmax.cpu())
        absmax, offset = torch.cat(scales), None
        if self.double_quant:
            absmax, nested, offset = bnb_quantize.quantize_scales(absmax)
            yield ".weight.nested_absmax", nested
            yield ".weight.nested_quant_map", dequantize.code_8bit(torch.device("cpu"))
        yield ".weight.absmax", absmax
        yield ".weight.quant_map", dequantize.code_4bit(self.name, torch.device("cpu"))
        state = bnb_state.QuantState(self.name, self.blocksize, dtype, shape, None if offset is None else offset.item())
        yield self.marker, state.pack()

    def _quantize(self, values: Tensor, name: str) -> tuple[Tensor, Tensor]:
        packed, absmax = bnb_quantize.quantize_blocks(values, quant_type=self.name, blocksize=self.blocksize)
        require_finite(absmax, f"The tensor {name}")
        return packed, absmax

    def _dequantize(self, packed: Tensor, scales: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        form = (count, 1, self.blocksize, self.name, dtype)
        return dequantize.dequantize_4bit(dequantize.Packed4bit(packed, scales, None, None, *form)).flatten()

    @classmethod
    def check(cls, weights: CheckpointWeights, module: str, config: Mapping[str, Any]) -> QuantizedSource:
        state = _state(weights, module, cls.marker)
        if state.nested_blocksize != NESTED_BLOCKSIZE:
            problem = f"its scales are quantized in blocks of {state.nested_blocksize}, not of 256"
            raise unfit(weights, f"{module}.weight", problem)
        if state.quant_type != cls.name:
            raise unfit(weights, f"{module}.weight", f"its state is of {state.quant_type}")
        form = cls(state.blocksize, state.nested_offset is not None)
        *specs, _ = form.parts(module, state.shape, state.dtype)
        for spec in specs:
            info, size = weights.tensors.get(spec.name), math.prod(spec.shape)
            if info is None or info.dtype != spec.dtype or math.prod(info.shape) != size:
                has = "is missing" if info is None else f"is {list(info.shape)} of {info.dtype}"
                problem = f"{spec.name} {has}; {size} elements of {spec.dtype} are needed"
                raise unfit(weights, f"{module}.weight", problem)
        suffixes = (*(spec.name.removeprefix(module) for spec in specs), cls.marker)
        return QuantizedSource(form, state.dtype, state.shape, suffixes)

    def decode(
        self, weights: CheckpointWeights, module: str, shape: StaticShape, dtype: torch.dtype, step: int
    ) -> Iterator[Tensor]:
        size, total, scales = self.blocksize, math.prod(shape), self._scales(weights, module)
        dtype = _state(weights, module, self.marker).dtype
        for first, count in ranges(total, step):
            packed = weights.read_part(f"{module}.weight", first // 2, (count + 1) // 2)
            yield self._dequantize(packed, scales[first // size : math.ceil((first + count) / size)], count, dtype)

    def _scales(self, weights: CheckpointWeights, module: str) -> Tensor:
        """Read the float32 scale of every block."""
        absmax = weights.read(f"{module}.weight.absmax").flatten()
        if not self.double_quant:
            return absmax
        offset = torch.tensor(_state(weights, module, self.marker).nested_offset)
        return dequantize.scales_reference(absmax, weights.read(f"{module}.weight.nested_absmax").flatten(), offset)

    def config_entries(self) -> dict[str, Any]:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": self.double_quant,
        }

    def buffers(self, shape: StaticShape) -> dict[str, Buffer]:
        slots = {f"_{name}" if name else "": buffer for name, buffer in self._data(shape).items()}
        return slots | {"_nested_offset": Buffer(torch.float32, ())} if self.double_quant else slots

    def call(self, shape: StaticShape, input: Node, stored: Mapping[str, Node], bias: Any) -> OperatorCall:
        tensors = [stored.get(suffix) for suffix in ("", "_absmax", "_nested_absmax", "_nested_offset")]
        geometry = (shape[1], shape[0], self.blocksize, self.name, program.COMPUTE_DTYPE)
        return torch.ops.vlmbuild.linear_4bit.default, (input, *tensors, bias, *geometry)

    def load(self, weights: CheckpointWeights, module: str, shape: StaticShape) -> dict[str, Tensor]:
        state = _state(weights, module, self.marker)
        nested = state.nested_offset is not None
        if (state.blocksize, state.shape, nested) != (self.blocksize, shape, self.double_quant):
            raise SourceError(
                f"{module}.weight is quantized as {state.shape} in blocks of {state.blocksize}"
                f"{' with nested scales' if nested else ''}, but the program says {shape}, {self.describe()}. The weights "
                "do not belong to the graph: build again."
            )
        found = {f"_{name}" if name else "": weights.map(module + _suffix(name)) for name in self._data(shape)}
        if state.nested_offset is not None:
            found["_nested_offset"] = torch.tensor(state.nested_offset, dtype=torch.float32)
        return found

    def onnx_weight(self, shape: StaticShape, dtype: torch.dtype, name: str) -> PackedWeight:
        """Return MatMulBnb4's weight: bitsandbytes' bytes, and scales in the compute dtype."""
        rows, columns = shape
        if columns % self.blocksize:
            raise UsageError(
                f"{name} has {columns} columns, which {self.name} in blocks of {self.blocksize} does not divide; ONNX "
                "Runtime needs it. Choose a smaller --blocksize, or --quantize int4."
            )
        attributes = {"K": columns, "N": rows, "block_size": self.blocksize, "quant_type": int(self.name == "nf4")}
        count = rows * columns
        parts = {"": Buffer(torch.uint8, (count // 2,)), "_absmax": Buffer(dtype, (count // self.blocksize,))}
        return PackedWeight("MatMulBnb4", attributes, parts)

    def encode_onnx(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[RoundedChunk]:
        scales = []
        for chunk in chunks:
            packed, absmax = self._quantize(chunk, name)
            yield RoundedChunk(chunk, self._dequantize(packed, absmax, chunk.numel(), torch.float32), {"": packed})
            scales.append(absmax)
        absmax = torch.cat(scales)
        if self.double_quant:
            absmax = dequantize.scales_reference(*bnb_quantize.quantize_scales(absmax))
        yield RoundedChunk(absmax[:0], absmax[:0], {"_absmax": absmax})

    def copy_onnx(self, weights: CheckpointWeights, module: str) -> dict[str, Tensor] | None:
        return {"": weights.read(f"{module}.weight").flatten(), "_absmax": self._scales(weights, module)}

    def rounded(self, values: Tensor, name: str) -> Tensor:
        """Round values; the rounding of scales, a hundred times smaller, is left out."""
        packed, absmax = self._quantize(values, name)
        return self._dequantize(packed, absmax, values.numel(), torch.float32)


@dataclass(frozen=True, slots=True)
class NF4(FourBit):
    """4-bit NormalFloat."""

    name: ClassVar[str] = "nf4"
    marker: ClassVar[str] = f"{_STATE}nf4"


@dataclass(frozen=True, slots=True)
class FP4(FourBit):
    """4-bit floating point."""

    name: ClassVar[str] = "fp4"
    marker: ClassVar[str] = f"{_STATE}fp4"


def _suffix(name: str) -> str:
    return f".weight.{name}" if name else ".weight"


def _state(weights: CheckpointWeights, module: str, marker: str) -> QuantState:
    return bnb_state.parse_quant_state(weights.read(module + marker), name=f"{weights.directory}: {module}{marker}")
