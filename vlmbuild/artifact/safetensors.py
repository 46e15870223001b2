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

ITEM_SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "C64": 8}
    | {"F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
)
"""Code of each dtype in headers -> bytes of an element."""


@functools.cache
def dtypes() -> Mapping[str, torch.dtype]:
    """Return the dtype of each code; headers can be read without it, and so without torch."""
    import torch

    return MappingProxyType(
        {
            "BOOL": torch.bool,
            "U8": torch.uint8,
            "I8": torch.int8,
            "U16": torch.uint16,
            "I16": torch.int16,
            "U32": torch.uint32,
            "I32": torch.int32,
            "U64": torch.uint64,
            "I64": torch.int64,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
            "F8_E5M2": torch.float8_e5m2,
            "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "F32": torch.float32,
            "F64": torch.float64,
            "C64": torch.complex64,
        }
    )


@functools.cache
def codes() -> Mapping[torch.dtype, str]:
    """Return the code of each dtype."""
    return MappingProxyType({dtype: code for code, dtype in dtypes().items()})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` to `end` of `file`, counted from the beginning of the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements."""
        return dtypes()[self.code]

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return self.end - self.start


def read_header(file: Path | str) -> dict[str, TensorInfo]:
    """Read the tensors of a safetensors file, in the order of their data, without reading the data.

    Raises SourceError, naming the file, for everything that the format forbids (truncation, holes, overlaps, bytes
    left over) and for two things that the library lets pass: duplicate names, and a header that begins with a space.
    """
    path = Path(file)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = _header_length(path, size, stream.read(8))
            data = stream.read(length)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}. Check the path and permissions.") from error
    if len(data) != length:
        raise _malformed(path, f"it is truncated: {8 + len(data)} bytes of at least {8 + length}")
    return _check_tensors(path, _parse_header(path, data), 8 + length, size)


def _header_length(path: Path, size: int, prefix: bytes) -> int:
    if len(prefix) < 8:
        raise _malformed(path, f"it is truncated: {size} bytes of at least 8")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _malformed(path, f"its header is {length} bytes long; the limit is {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise _malformed(path, f"it is truncated: {size} bytes of at least {8 + length}")
    return length


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


def _check_tensors(path: Path, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    infos = [_tensor_info(path, name, value, data_start) for name, value in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    position = data_start
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


def _tensor_info(path: Path, name: str, value: object, data_start: int) -> TensorInfo:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in ITEM_SIZES:
        raise _malformed(path, f"tensor {name!r} has the unknown dtype {code!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _malformed(path, f"tensor {name!r} has a shape or data_offsets that are not lists of sizes")
    start, end = offsets
    expected = math.prod(shape) * ITEM_SIZES[code]
    if end - start != expected:
        raise _malformed(path, f"tensor {name!r} has {end - start} bytes of data, but {code} {shape} needs {expected}")
    return TensorInfo(name, code, tuple(shape), path, data_start + start, data_start + end)


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
