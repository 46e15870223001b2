"""Reading the weights of a checkpoint: one safetensors file or shards, headers first, one tensor at a time."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from vlmbuild.artifact.canonical import unique_keys
from vlmbuild.artifact.files import Identity
from vlmbuild.artifact.paths import check_path
from vlmbuild.artifact.safetensors import TensorInfo, pickled_files, read_header
from vlmbuild.errors import IntegrityError, SourceError

if TYPE_CHECKING:
    import torch

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 * 2**20


class CheckpointWeights:
    """The tensors of a checkpoint directory, read one at a time from model.safetensors or its shards.

    The constructor reads headers only. It raises SourceError naming the file or tensor when the weights are missing,
    pickled, truncated, malformed, or not as the index says. `strip_prefix` is the leading part of every tensor's name in the
    files, and is left out here.
    """

    def __init__(self, directory: Path | str, *, strip_prefix: str = "") -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise SourceError(f"{self.directory} is not a folder. Give the folder of a checkpoint.")
        if (self.directory / SINGLE).exists():
            tensors, names = read_header(self.directory / SINGLE), [SINGLE]
        elif (self.directory / INDEX).exists():
            weight_map = _read_index(self.directory / INDEX)
            names = sorted(set(weight_map.values()))
            tensors = _read_shards(self.directory, weight_map, names)
        else:
            raise _no_weights(self.directory)
        if other := next((name for name in tensors if not name.startswith(strip_prefix)), None):
            raise SourceError(f"{self.directory}: {other} does not begin with {strip_prefix!r}. Drop --strip-prefix.")
        tensors = {name.removeprefix(strip_prefix): info for name, info in tensors.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.files: tuple[Path, ...] = tuple(self.directory / name for name in names)
        self.identities = {file: Identity.of(file.stat()) for file in self.files}
        self._mappings: dict[Path, mmap.mmap] = {}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own. Raises the errors of `read_part`."""
        info = self.info(name)
        return self.read_part(name, 0, math.prod(info.shape)).reshape(info.shape)

    def info(self, name: str) -> TensorInfo:
        """Return a tensor's file and range. Raises SourceError when there is none of this name."""
        if name not in self.tensors:
            raise SourceError(
                f"{self.directory} has no tensor {name!r}, only {len(self.tensors)} others. Check that the weights "
                "belong to its config.json."
            )
        return self.tensors[name]

    def read_part(self, name: str, first: int, count: int) -> torch.Tensor:
        """Read `count` elements of a tensor from the element `first` on, flat, into memory of their own.

        Raises SourceError when there is no such tensor, or its file changed since the header was read.
        """
        import torch

        info = self.info(name)
        # Memory of our own, not a mapping of the file: a mapped tensor changes when the file is written to, and its pages
        # count as ours.
        data = torch.empty(count * info.dtype.itemsize, dtype=torch.uint8)
        start = info.start + first * info.dtype.itemsize
        assert start + data.nbytes <= info.end
        try:
            descriptor = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                complete = _read_into(descriptor, data.numpy().data, start)
                changed = Identity.of(os.fstat(descriptor)) != self.identities[info.file]
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceError(
                f"{info.file} cannot be read: {error.strerror}. Check the disk and permissions."
            ) from error
        if changed or not complete:
            raise SourceError(
                f"{info.file} changed while it was read, at tensor {name!r}. Leave it alone and try again."
            )
        return data.view(info.dtype)

    def map(self, name: str) -> torch.Tensor:
        """Map one tensor to the file: read when it is touched, copied when it is written to.

        The file must stay as it is, though it may be removed. Raises the errors of `read`.
        """
        info = self.info(name)
        if info.start % info.dtype.itemsize or not info.nbytes:
            return self.read(name)
        import torch

        buffer = self._mapping(info.file)
        flat = torch.frombuffer(buffer, dtype=info.dtype, count=math.prod(info.shape), offset=info.start)
        return flat.reshape(info.shape)

    def _mapping(self, file: Path) -> mmap.mmap:
        if file not in self._mappings:
            try:
                with file.open("rb") as stream:
                    changed = Identity.of(os.fstat(stream.fileno())) != self.identities[file]
                    mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise SourceError(
                    f"{file} cannot be mapped: {error.strerror}. Check the disk and permissions."
                ) from error
            if changed:
                raise SourceError(f"{file} changed since its header was read. Leave it alone and try again.")
            self._mappings[file] = mapping
        return self._mappings[file]


def _read_into(descriptor: int, view: memoryview, offset: int) -> bool:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def _read_index(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_INDEX_BYTES + 1)
        if len(data) > _MAX_INDEX_BYTES:
            raise ValueError(f"it is larger than {_MAX_INDEX_BYTES} bytes")
        weight_map = json.loads(data.decode(), object_pairs_hook=unique_keys)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is not an object with entries")
        for shard in weight_map.values():
            check_path(shard)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, IntegrityError) as error:
        raise SourceError(f"{path} is not a valid index: {error!s}. Download the checkpoint again.") from error
    return weight_map


def _read_shards(directory: Path, weight_map: dict[str, str], names: list[str]) -> dict[str, TensorInfo]:
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise SourceError(f"{directory} lacks the shards {', '.join(missing)} of {INDEX}. Download them.")
    found = {name: read_header(directory / name) for name in names}
    for tensor, shard in weight_map.items():
        if tensor not in found[shard]:
            raise SourceError(
                f"{directory / shard} lacks the tensor {tensor!r} that {INDEX} says is there. Download both again."
            )
    for shard, infos in found.items():
        for tensor in infos:
            if weight_map.get(tensor) != shard:
                raise SourceError(
                    f"{directory / shard} holds the tensor {tensor!r}, but {INDEX} does not say so. "
                    "Download both again."
                )
    return {tensor: found[shard][tensor] for tensor, shard in weight_map.items()}


def _no_weights(directory: Path) -> SourceError:
    if pickled := pickled_files(directory):
        return SourceError(
            f"{directory} has its weights only as pickle ({', '.join(pickled)}), which is refused because loading it "
            "runs code. Convert it where you trust it: "
            "from transformers import AutoModelForImageTextToText as Auto; "
            f"Auto.from_pretrained({str(directory)!r}, dtype='auto').save_pretrained('converted'), then copy the "
            "processor files next to the result."
        )
    return SourceError(
        f"{directory} has no weights: neither {SINGLE} nor {INDEX} is there. Give the folder of a complete checkpoint."
    )
