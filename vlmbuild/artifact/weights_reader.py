"""Reading the weights of a checkpoint: one safetensors file or shards, headers first, one tensor at a time."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from vlmbuild.artifact.canonical import unique_keys
from vlmbuild.artifact.files import Identity, closing, open_file, read_at_most
from vlmbuild.artifact.paths import check_path
from vlmbuild.artifact.safetensors import TensorInfo, pickled_files, read_header
from vlmbuild.errors import IntegrityError, SourceError
from vlmbuild.util.text import listed

if TYPE_CHECKING:
    import torch

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 * 2**20


class CheckpointWeights:
    """The tensors of a checkpoint directory, read one at a time from model.safetensors or its shards.

    The constructor reads headers only. It raises SourceError naming the file or tensor when the weights are missing,
    pickled, truncated, malformed, or not as the index says.
    """

    def __init__(
        self, directory: Path | str, open_name: Callable[[str], int] | None = None, *, strip_prefix: str = ""
    ) -> None:
        """
        Args:
            directory: The checkpoint.
            open_name: Opens a file of it by name, as a descriptor; by default in the directory.
            strip_prefix: Leading part of every tensor's name in the files, left out here.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise SourceError(f"{self.directory} is not a folder. Give the folder of a checkpoint.")
        self._open_name = open_name or (lambda name: open_file(self.directory / name))
        self._identities: dict[str, Identity] = {}
        self._mappings: dict[str, mmap.mmap] = {}
        try:
            tensors = self._header(SINGLE)
        except FileNotFoundError:
            tensors = self._read_shards()
        if other := next((name for name in tensors if not name.startswith(strip_prefix)), None):
            raise SourceError(f"{self.directory}: {other} does not begin with {strip_prefix!r}. Drop --strip-prefix.")
        tensors = {name.removeprefix(strip_prefix): info for name, info in tensors.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.files: tuple[Path, ...] = tuple(self.directory / name for name in self._identities)
        self.identities = {self.directory / name: identity for name, identity in self._identities.items()}

    def _header(self, file: str) -> dict[str, TensorInfo]:
        with self._reading(file), closing(self._open_name(file)) as descriptor:
            self._identities[file] = Identity.of(os.fstat(descriptor))
            return read_header(descriptor, self.directory / file, file)

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        """Turn an OSError into a SourceError, unless it says that there is no such file."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise SourceError(
                f"{self.directory / file} cannot be read: {error.strerror}. Check the disk and permissions."
            ) from error

    def _read_shards(self) -> dict[str, TensorInfo]:
        try:
            weight_map = self._read_index()
        except FileNotFoundError:
            raise _no_weights(self.directory) from None
        found, missing = {}, []
        for shard in sorted(set(weight_map.values())):
            try:
                found[shard] = self._header(shard)
            except FileNotFoundError:
                missing.append(shard)
        if missing:
            raise SourceError(f"{self.directory} lacks the shards {', '.join(missing)} of {INDEX}. Download them.")
        for shard, infos in found.items():
            claimed = {tensor for tensor, file in weight_map.items() if file == shard}
            if wrong := sorted(claimed ^ infos.keys()):
                raise SourceError(
                    f"{self.directory / shard} and {INDEX} disagree about {listed(wrong)}. Download both again."
                )
        return {tensor: found[shard][tensor] for tensor, shard in weight_map.items()}

    def _read_index(self) -> dict[str, str]:
        with self._reading(INDEX), closing(self._open_name(INDEX)) as descriptor:
            data = read_at_most(descriptor, _MAX_INDEX_BYTES)
        try:
            if len(data) > _MAX_INDEX_BYTES:
                raise ValueError(f"it is larger than {_MAX_INDEX_BYTES} bytes")
            weight_map: dict[str, str] = json.loads(data.decode(), object_pairs_hook=unique_keys)["weight_map"]
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError("weight_map is not an object with entries")
            for shard in weight_map.values():
                check_path(shard)
        except (ValueError, LookupError, TypeError, RecursionError, IntegrityError) as error:
            raise SourceError(
                f"{self.directory / INDEX} is not a valid index: {error!s}. Download the checkpoint again."
            ) from error
        return weight_map

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
        with self._opened(info.file) as descriptor:
            rest = data.numpy().data
            while rest:
                count = os.preadv(descriptor, [rest], start)
                if count == 0:
                    raise self._changed(info.file)
                rest, start = rest[count:], start + count
        return data.view(info.dtype)

    @contextmanager
    def _opened(self, file: str) -> Iterator[int]:
        """Open a file whose header was read. Raises SourceError when it cannot be read, or changes until the end."""
        try:
            with self._reading(file), closing(self._open_name(file)) as descriptor:
                yield descriptor
                if Identity.of(os.fstat(descriptor)) != self._identities[file]:
                    raise self._changed(file)
        except FileNotFoundError as error:
            raise self._changed(file) from error

    def _changed(self, file: str) -> SourceError:
        return SourceError(f"{self.directory / file} changed while it was read. Leave it alone and try again.")

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

    def _mapping(self, file: str) -> mmap.mmap:
        if file not in self._mappings:
            with self._opened(file) as descriptor:
                self._mappings[file] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        return self._mappings[file]


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
