"""The header of a GGUF file: metadata, and names, shapes and offsets of tensors, written by the package `gguf`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from vlmbuild.families.gguf import GgufPart
from vlmbuild.quant.gguf import GgufFormat, gguf_package
from vlmbuild.runtime.gguf.layout import MODEL, GgufTensor

_TYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOAT32: Final = ("V_ENC_EMBD_POS",)
"""Tensors that llama.cpp adds to float32 ones."""
_NO_BFLOAT16: Final = ("V_ENC_EMBD_PATCH", "V_MM_PATCH_MERGER")
"""Tensors of operators that llama.cpp does not have in bfloat16."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor with its type.

    Attributes:
        tensor: The tensor.
        type: Its `gguf.GGMLQuantizationType`.
        form: The format that it is rounded to; None for plain floats.
        constant: Its values, if it is cut from no parameter.
    """

    tensor: GgufTensor
    type: Any
    form: GgufFormat | None
    constant: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        block, nbytes = gguf_package().GGML_QUANT_SIZES[self.type]
        return int(math.prod(self.tensor.shape) // block * nbytes)


def stored(tensor: GgufTensor, dtype: str, form: GgufFormat | None) -> Stored:
    """Choose the type of a tensor; vectors and what llama.cpp computes in float32 stay float32."""
    gguf = gguf_package()
    if form is not None and len(tensor.shape) == 2:
        return Stored(tensor, form.type, form)
    name = _TYPES[dtype]
    if len(tensor.shape) < 2 or _is_one_of(tensor, _FLOAT32) or (name == "BF16" and _is_one_of(tensor, _NO_BFLOAT16)):
        name = "F32"
    elif name == "BF16" and _is_one_of(tensor, ("V_MM_INP_PROJ",)):  # is transposed when it is read
        name = "F16"
    return Stored(tensor, gguf.GGMLQuantizationType[name], None)


def constant(kind: str, values: tuple[float, ...]) -> Stored:
    """Make a tensor of the language model from values that follow from the config."""
    gguf = gguf_package()
    name, shape = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[kind]]}.weight", (len(values),)
    tensor = GgufTensor(MODEL, name, shape, "", shape, GgufPart(name))
    return Stored(tensor, gguf.GGMLQuantizationType.F32, None, values)


def _is_one_of(tensor: GgufTensor, kinds: Sequence[str]) -> bool:
    gguf = gguf_package()
    return any(tensor.name.startswith(f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[kind]]}.") for kind in kinds)


def general_values(tensors: Sequence[Stored], dtype: str, kind: str, name: str) -> dict[str, Any]:
    """Return the metadata that every file has. The type of a file is that of most of its matrices' values."""
    gguf = gguf_package()
    counts: dict[str, int] = {}
    for each in tensors:
        if len(each.tensor.shape) > 1:
            counts[each.type.name] = counts.get(each.type.name, 0) + math.prod(each.tensor.shape)
    most = max(counts, key=lambda name: counts[name], default=_TYPES[dtype])
    types = gguf.LlamaFileType
    return {
        "type": gguf.GGUFType.MODEL if kind == "model" else gguf.GGUFType.MMPROJ,
        "name": name,
        "file_type": int(types.ALL_F32 if most == "F32" else types[f"MOSTLY_{most}"]),
        "quantization_version": gguf.GGML_QUANT_VERSION,
    }


def header(arch: str, values: Mapping[str, Any], tensors: Sequence[Stored]) -> bytes:
    """Write everything that comes before the first tensor, padding included.

    Args:
        arch: Name in `gguf.MODEL_ARCH`.
        values: Method of `gguf.GGUFWriter` without its `add_` -> value.
        tensors: Tensors in the order of the file.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]])
    for key, value in values.items():
        getattr(writer, f"add_{key}")(gguf.RopeScalingType(value) if key == "rope_scaling_type" else value)
    for each in tensors:
        writer.add_tensor_info(
            each.tensor.name, each.tensor.shape, np.dtype(np.float32), each.nbytes, raw_dtype=each.type
        )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = path.read_bytes()
    return data + bytes(padding(len(data)))


def padding(size: int) -> int:
    """Return the bytes between something of this size and what follows it."""
    return int(-size % gguf_package().GGUF_DEFAULT_ALIGNMENT)
