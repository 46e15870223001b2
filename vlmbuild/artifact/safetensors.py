"""The safetensors header: its rules, reading it strictly, and the bytes of a tensor."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from vlmbuild.artifact.canonical import unique_keys
from vlmbuild.errors import SourceError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES: Final = 32 * 2**20
MAX_TENSORS: Final = 100_000
METADATA_KEY: Final = "__metadata__"

_DTYPES: Final = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""Code in headers -> name in torch, and bytes of an element: headers are read without torch."""


@functools.cache
def codes() -> Mapping[torch.dtype, str]:
    """Return the code of each dtype."""
    import torch

    return MappingProxyType({getattr(torch, name): code for code, (name, _) in _DTYPES.items()})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` to `end` of a checkpoint's `file`, from its beginning."""

    name: str
    code: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements."""
        import torch

        dtype: torch.dtype = getattr(torch, _DTYPES[self.code][0])
        return dtype

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return self.end - self.start


def read_header(descriptor: int, path: Path, file: str) -> dict[str, TensorInfo]:
    """Read the tensors of an open safetensors file, in the order of their data, without reading the data.

    Args:
        descriptor: The open file.
        path: Its path in messages.
        file: Its name in the checkpoint.

    Raises:
        SourceError: Something that the format forbids (truncation, holes, overlaps, bytes left over), or one of two things
            that the library lets pass: duplicate names, and a header that begins with a space.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size >= 8 and length > MAX_HEADER_BYTES:
        raise _malformed(path, f"its header is {length} bytes long; the limit is {MAX_HEADER_BYTES}")
    if size < 8 + length:
        raise _malformed(path, f"it is truncated: {size} bytes of at least {8 + length}")
    header = _parse_header(path, os.pread(descriptor, length, 8))
    infos = [_tensor_info(path, file, name, value, 8 + length) for name, value in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    position = 8 + length
    for info in infos:
        if info.start != position:
            kind = "overlaps the one before it" if info.start < position else "leaves a hole before it"
            raise _malformed(path, f"the data of tensor {info.name!r} {kind}")
        position = info.end
    if size < position:
        raise _malformed(path, f"it is truncated: {size} bytes of {position}")
    if size > position:
        raise _malformed(path, f"{size - position} bytes follow its last tensor")
    return {info.name: info for info in infos}


def _parse_header(path: Path, data: bytes) -> dict[str, Any]:
    if not data.startswith(b"{"):
        raise _malformed(path, "its header does not begin with '{'")
    try:
        header = json.loads(data.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"its header is not valid JSON: {error}") from error
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(path, f"its {METADATA_KEY} is not an object of strings")
    if len(header) > MAX_TENSORS:
        raise _malformed(path, f"it has {len(header)} tensors; the limit is {MAX_TENSORS}")
    assert isinstance(header, dict)  # it begins with '{'
    return header


def _tensor_info(path: Path, file: str, name: str, value: object, data_start: int) -> TensorInfo:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise _malformed(path, f"tensor {name!r} has the unknown dtype {code!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _malformed(path, f"tensor {name!r} has a shape or data_offsets that are not lists of sizes")
    start, end = offsets
    expected = math.prod(shape) * _DTYPES[code][1]
    if end - start != expected:
        raise _malformed(path, f"tensor {name!r} has {end - start} bytes of data, but {code} {shape} needs {expected}")
    return TensorInfo(name, code, tuple(shape), file, data_start + start, data_start + end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _malformed(path: Path, reason: str) -> SourceError:
    return SourceError(f"{path} is not a valid safetensors file: {reason}. Download or convert it again.")


def encode_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], int, int]]) -> bytes:
    """Encode the JSON of a header from (name, dtype, shape, start, end), with the one metadata key that readers look for."""
    header: dict[str, object] = {METADATA_KEY: {"format": "pt"}}  # two keys would come in random order in other writers
    for name, dtype, shape, start, end in tensors:
        header[name] = {"dtype": codes()[dtype], "shape": list(shape), "data_offsets": [start, end]}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def frame_header(header: bytes, framed_length: int | None = None) -> bytes:
    """Return length prefix and header, filled with spaces to `framed_length`, or to a multiple of 8 to align the data."""
    length = math.ceil(len(header) / 8) * 8 if framed_length is None else framed_length - 8
    assert len(header) <= length
    return length.to_bytes(8, "little") + header.ljust(length)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the raw little-endian bytes of a tensor, with no conversion of its values; a view where that is possible."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


_PICKLE = re.compile(r"(pytorch_model.*\.bin|.*\.(pt|pth|ckpt|pkl|pickle))(\.index\.json)?")


def pickled_files(directory: Path) -> list[str]:
    """List checkpoint files that can only be read by unpickling."""
    return sorted(entry.name for entry in directory.iterdir() if _PICKLE.fullmatch(entry.name))
