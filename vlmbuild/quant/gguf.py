"""Formats of llama.cpp, in blocks of a row: rounded and read back by the package `gguf`. Only GGUF files hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vlmbuild.errors import IncompatibleError
from vlmbuild.formats import StaticShape, WeightFormat
from vlmbuild.util.lazy import LazyModule
from vlmbuild.util.validation import require_finite

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor
else:
    torch, np = LazyModule("torch"), LazyModule("numpy")


def gguf_package() -> Any:
    """Import the package `gguf`. Raises IncompatibleError when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise IncompatibleError(
            f"GGUF files need the package gguf, which cannot be imported: {error}. Install it with `pip install "
            "'vlmbuild[gguf]'`."
        ) from error
    return gguf


class GgufFormat(WeightFormat):
    """A format of llama.cpp, by its name there."""

    __slots__ = ()

    targets: ClassVar[tuple[str, ...]] = ("gguf",)
    default_roles: ClassVar[tuple[str, ...]] = ("language", "embedding", "head")
    looked_up: ClassVar[bool] = True
    input_error: ClassVar[float] = 9e-3

    @property
    def type(self) -> Any:
        """The package's value for the format."""
        return gguf_package().GGMLQuantizationType[self.name.upper()]

    def bits(self, shape: StaticShape) -> int:
        block, nbytes = map(int, gguf_package().GGML_QUANT_SIZES[self.type])
        return 8 * nbytes * math.ceil(math.prod(shape) / block)

    def describe(self, target: str = "trainable") -> str:
        return self.name

    def refusal(self, shape: StaticShape) -> str:
        block, _ = gguf_package().GGML_QUANT_SIZES[self.type]
        return f"rows of {shape[-1]} values are not whole blocks of {block}" if shape[-1] % block else ""

    def pack(self, rows: Tensor, name: str) -> npt.NDArray[np.uint8]:
        """Quantize float32 [rows, in] to the bytes of a file. Raises SourceError with `name` for NaN and infinity."""
        require_finite(rows, f"The tensor {name}")
        packed: npt.NDArray[np.uint8] = gguf_package().quants.quantize(rows.numpy(), self.type)
        return packed

    def unpack(self, packed: npt.NDArray[np.uint8]) -> Tensor:
        """Dequantize the bytes of whole rows to float32 [rows, in]."""
        values: Tensor = torch.from_numpy(gguf_package().quants.dequantize(packed, self.type))
        return values

    def rounded(self, values: Tensor, name: str) -> Tensor:
        return self.unpack(self.pack(values.float().view(1, -1), name)).flatten()


@dataclass(frozen=True, slots=True)
class Q8_0(GgufFormat):  # noqa: N801  (llama.cpp's name)
    """Signed bytes with a scale for 32 values: 8.5 bits."""

    name: ClassVar[str] = "q8_0"


@dataclass(frozen=True, slots=True)
class Q5_1(GgufFormat):  # noqa: N801
    """5 bits with a scale and a least value for 32 values: 6 bits."""

    name: ClassVar[str] = "q5_1"


@dataclass(frozen=True, slots=True)
class Q5_0(GgufFormat):  # noqa: N801
    """5 bits with a scale for 32 values: 5.5 bits."""

    name: ClassVar[str] = "q5_0"


@dataclass(frozen=True, slots=True)
class Q4_1(GgufFormat):  # noqa: N801
    """4 bits with a scale and a least value for 32 values: 5 bits."""

    name: ClassVar[str] = "q4_1"


@dataclass(frozen=True, slots=True)
class Q4_0(GgufFormat):  # noqa: N801
    """4 bits with a scale for 32 values: 4.5 bits."""

    name: ClassVar[str] = "q4_0"
