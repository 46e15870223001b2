"""Formats that store the weight of a linear layer in fewer bits.

To add a format, write one file in `vlmbuild/quant/` and add one row to `FORMATS`. The file holds a frozen dataclass derived
from `WeightFormat`. Its fields are the format's options, each with a default and all checked in `__post_init__`; its methods
say how the weight lies in a checkpoint, which operator multiplies by it, and, for the target onnx, how ONNX Runtime reads it.
Apart from bitsandbytes' config, Unsloth's arguments and the default of `auto`, nothing else names a format.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Self

from vlmbuild.errors import SourceError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.fx import Node

    from vlmbuild.artifact.weights_reader import CheckpointWeights
    from vlmbuild.artifact.weights_writer import TensorSpec

StaticShape = tuple[int, ...]
OperatorCall = tuple[Callable[..., Any], tuple[Any, ...]]
"""An operator and its arguments."""

FORMATS: Final[dict[str, str]] = {
    "nf4": "vlmbuild.quant.nf4:NF4",
    "fp4": "vlmbuild.quant.nf4:FP4",
    "int8": "vlmbuild.quant.int8:Int8",
    "int4": "vlmbuild.quant.int4:Int4",
    "w4a16": "vlmbuild.quant.compressed_formats:W4A16",
    "w8a8": "vlmbuild.quant.compressed_formats:W8A8",
    "fp8": "vlmbuild.quant.compressed_formats:FP8",
    "q8_0": "vlmbuild.quant.gguf:Q8_0",
    "q5_1": "vlmbuild.quant.gguf:Q5_1",
    "q5_0": "vlmbuild.quant.gguf:Q5_0",
    "q4_1": "vlmbuild.quant.gguf:Q4_1",
    "q4_0": "vlmbuild.quant.gguf:Q4_0",
}
"""Name in recipes -> module and class, imported on first use: `--help` lists the names and needs no torch."""


class Buffer(NamedTuple):
    """Dtype and shape of one tensor of a stored weight."""

    dtype: torch.dtype
    shape: StaticShape


class QuantizedSource(NamedTuple):
    """A quantized weight in a checkpoint.

    Attributes:
        format: Its format.
        dtype: Dtype of the dequantized weight.
        shape: Shape of the dequantized weight.
        suffixes: Names of its tensors without the module's name, the packed weight first.
    """

    format: WeightFormat
    dtype: torch.dtype
    shape: StaticShape
    suffixes: tuple[str, ...]


BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share a scale in bitsandbytes' 4-bit layout."""
NESTED_BLOCKSIZE: Final = 256
"""Scales that share a scale of their own in that layout."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [out, in] in an ONNX model.

    Attributes:
        operator: ONNX Runtime operator that multiplies by it.
        attributes: Attributes of that operator.
        parts: Its tensors by suffix, in the order of the operator's inputs.
    """

    operator: str
    attributes: Mapping[str, Any]
    parts: Mapping[str, Buffer]


class RoundedChunk(NamedTuple):
    """Some consecutive values of a weight on their way into an artifact.

    Attributes:
        values: The values before rounding.
        rounded: The values that the parts stand for, float32.
        parts: Suffix -> next elements of that tensor.
    """

    values: Tensor
    rounded: Tensor
    parts: Mapping[str, Tensor]


class WeightFormat(ABC):
    """A way to store weights. Formats are values: two with equal options are equal.

    Attributes:
        name: Name in recipes.
        targets: Targets that can multiply by it.
        marker: Suffix, after a module's name, of the tensor by which a checkpoint's reader knows this format; "" if no
            checkpoint holds it.
        shared: Options that all layers of an artifact with this format have in common.
        default_roles: Entries of `QuantSpec.roles` where the user names none.
        input_error: Relative error (root mean square) of inputs that engines round before they multiply by the weight.
        looked_up: True if embeddings may have it: its ONNX form is that of MatMulNBits.
    """

    __slots__ = ()

    name: ClassVar[str]
    targets: ClassVar[tuple[str, ...]] = ("trainable", "aoti")
    marker: ClassVar[str] = ""
    shared: ClassVar[tuple[str, ...]] = ()
    default_roles: ClassVar[tuple[str, ...]] = ("language",)
    input_error: ClassVar[float] = 0.0
    looked_up: ClassVar[bool] = False

    def layout(self, shape: StaticShape) -> str:
        """Return what `Dequantized.layout` says of such weights in a source; "" if no source is dequantized from it."""
        return ""

    @abstractmethod
    def bits(self, shape: StaticShape) -> int:
        """Count the bits that a weight of this shape takes with its scales."""

    @abstractmethod
    def describe(self, target: str = "trainable") -> str:
        """Describe for people how a target stores the format: "nf4, blocks of 64, scales in 8 bits"."""

    def refusal(self, shape: StaticShape) -> str:
        """Say why a weight of this shape keeps its dtype instead; "" if it can be stored, or `parts` raises."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values; floats in hexadecimal."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # a dataclass
        return {"name": self.name} | {k: v.hex() if isinstance(v, float) else v for k, v in options.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Convert back from `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        options = {field.name: values[field.name] for field in fields(cls)}  # type: ignore[arg-type]  # a dataclass
        defaults = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: float.fromhex(v) if isinstance(defaults[k], float) else v for k, v in options.items()})

    def chunk_unit(self, shape: StaticShape) -> int:
        """Return the number of values quantized together: chunks for `encode` and `encode_onnx` are multiples of it."""
        return shape[-1]

    def fitted(self, shape: StaticShape) -> Self | None:
        """Return the format with options that suit a weight's shape; None if it has none."""
        return self

    # In a checkpoint. Tensors are named by the module and a suffix, as ".weight" or ".SCB".

    def parts(self, module: str, shape: StaticShape, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """Return the specs of the tensors that store a weight, the packed weight first. Raises UsageError for a bad shape."""
        raise self._unsupported("a checkpoint")

    def encode(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[tuple[str, Tensor]]:
        """Quantize a weight that comes in flat chunks; yield (suffix, next elements of that tensor).

        Args:
            chunks: Values, each chunk but the last a multiple of `chunk_unit` long.
            shape: Shape of the weight.
            dtype: Dtype of the weight when it is dequantized.
            name: Name for messages.

        Raises:
            SourceError: The weight holds NaN, infinity, or values that the format has no scale for.
        """
        raise self._unsupported("a checkpoint")

    def encode_rounded(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[RoundedChunk]:
        """Quantize as `encode` does, and yield the values that the parts stand for too: for targets that record losses."""
        raise self._unsupported("a target that records losses")

    @classmethod
    def check(cls, weights: CheckpointWeights, module: str, config: Mapping[str, Any]) -> QuantizedSource:
        """Read the format of a stored weight, and check that its tensors fit each other: kernels do not.

        Args:
            weights: The checkpoint.
            module: Name of the module in the checkpoint.
            config: The `quantization_config` of config.json.

        Raises:
            SourceError: A tensor is missing, or has another size or dtype.
        """
        raise NotImplementedError

    def decode(
        self, weights: CheckpointWeights, module: str, shape: StaticShape, dtype: torch.dtype, step: int
    ) -> Iterator[Tensor]:
        """Dequantize a stored weight, flat, in chunks of at most `step` elements. Formats that store a dtype use that one."""
        raise self._unsupported("a checkpoint")

    def config_entries(self) -> dict[str, Any]:
        """Return the format's entries of `quantization_config` in config.json; {} if transformers does not know it."""
        return {}

    # In a program. Slots are named by the weight's slot and a suffix, as "" or "_absmax".

    def buffers(self, shape: StaticShape) -> dict[str, Buffer]:
        """Return the slots that take the place of the weight's, by suffix."""
        raise self._unsupported("a graph")

    def call(self, shape: StaticShape, input: Node, stored: Mapping[str, Node], bias: Any) -> OperatorCall:
        """Return the operator that multiplies by the stored weight, and its arguments."""
        raise self._unsupported("a graph")

    def load(self, weights: CheckpointWeights, module: str, shape: StaticShape) -> dict[str, Tensor]:
        """Map the tensors of `buffers` from a checkpoint. Raises SourceError when it stores the weight otherwise."""
        raise unfit(weights, f"{module}.weight", f"{self.name} has no form for a graph")

    # In an ONNX model.

    def onnx_weight(self, shape: StaticShape, dtype: torch.dtype, name: str) -> PackedWeight:
        """Return how an ONNX model stores the weight; `dtype` is for scales. Raises UsageError when it cannot."""
        raise self._unsupported("ONNX Runtime")

    def encode_onnx(
        self, chunks: Iterable[Tensor], shape: StaticShape, dtype: torch.dtype, name: str
    ) -> Iterator[RoundedChunk]:
        """Quantize a weight for an ONNX model, with `chunks`, `name` and errors as in `encode` and `dtype` for scales."""
        raise self._unsupported("ONNX Runtime")

    def copy_onnx(self, weights: CheckpointWeights, module: str) -> dict[str, Tensor] | None:
        """Return a stored weight's tensors for an ONNX model without rounding again; None if the layouts differ."""
        return None

    def rounded(self, values: Tensor, name: str) -> Tensor:
        """Round flat values as the format does, to float32. Raises SourceError for NaN and infinity."""
        raise self._unsupported("a budget")

    def _unsupported(self, where: str) -> UsageError:
        return UsageError(f"The format {self.name} has no form for {where}. Choose nf4.")


def format_class(name: str) -> type[WeightFormat]:
    """Return the class of a format. Raises ValueError for a name that is not in `FORMATS`."""
    if name not in FORMATS:
        raise ValueError(f"the weight format {name!r} is unknown")
    module, _, attribute = FORMATS[name].partition(":")
    found: type[WeightFormat] = getattr(importlib.import_module(module), attribute)
    return found


def format_from_json(values: Mapping[str, Any]) -> WeightFormat:
    """Convert back from `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
    try:
        return format_class(values["name"]).from_json(values)
    except UsageError as error:
        raise ValueError(str(error)) from error


def unfit(weights: CheckpointWeights, name: str, problem: str) -> SourceError:
    """Make the error for a stored weight whose tensors do not fit each other."""
    return SourceError(
        f"{weights.directory}: the quantized weight {name} cannot be used: {problem}. If the checkpoint is complete, its "
        "layout is not supported: build from the unquantized one."
    )


def ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of consecutive chunks; one empty chunk of nothing."""
    for first in range(0, max(total, 1), step):
        yield first, min(step, total - first)
