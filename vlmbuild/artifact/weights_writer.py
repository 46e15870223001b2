"""Writing weights to safetensors files, one tensor at a time."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from vlmbuild.artifact.safetensors import METADATA_KEY, codes, encode_header, frame_header, tensor_bytes
from vlmbuild.artifact.weights_reader import INDEX, SINGLE
from vlmbuild.artifact.writer import ArtifactWriter, OutputFile
from vlmbuild.errors import OutputError
from vlmbuild.util.text import listed

SHARD_BYTES = 2**28
"""Bytes of a shard: moderate, so that all cores can write, hash and verify one artifact."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that will be stored. With `exact=False` the one dimension of `shape` is the most it can have."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    exact: bool = True

    @property
    def nbytes(self) -> int:
        """The bytes of the data, or the most that they can be."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fits(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor has this shape, or one that is small enough."""
        if self.exact:
            return tuple(tensor.shape) == self.shape
        return tensor.dim() == len(self.shape) and all(map(operator.le, tensor.shape, self.shape))


@dataclass
class _Shard:
    """The layout of one file, and the bytes written so far."""

    name: str
    specs: tuple[TensorSpec, ...]
    greatest_header: bytes
    starts: dict[str, int]
    file: OutputFile
    remaining: int
    written: dict[str, int] = field(default_factory=dict)
    deferred: dict[str, torch.Tensor] = field(default_factory=dict)

    def finish(self) -> None:
        """Write what was deferred and the header, and close the file."""
        if self.deferred:
            entries = []
            position = 0
            for spec in self.specs:
                tensor = self.deferred.get(spec.name)
                shape = spec.shape if tensor is None else tuple(tensor.shape)
                end = position + math.prod(shape) * spec.dtype.itemsize
                entries.append((spec.name, spec.dtype, shape, position, end))
                if tensor is not None:
                    self.file.write_at(tensor_bytes(tensor), len(self.greatest_header) + position)
                position = end
            self.file.write_at(frame_header(encode_header(entries), len(self.greatest_header)), 0)
            self.deferred.clear()
        self.file.close()


class WeightsWriter:
    """Writes model.safetensors, or shards and an index, in the form that transformers and safetensors read.

    The specs decide the shards and the place of every tensor, so tensors may be added in any order, whole or in chunks, and
    each is written at once. Only a tensor whose size is not known beforehand (`exact=False`; a few hundred bytes each)
    waits in memory until its shard is complete and lies at the end of it; the header is reserved at its greatest length and
    filled with spaces, which the format allows. That costs no temporary copy of the data.

    Several threads may write, each to shards of its own (`shards`). Raises OutputError when the specs contradict each other.
    """

    def __init__(
        self,
        writer: ArtifactWriter,
        specs: Sequence[TensorSpec | tuple[TensorSpec, ...]],
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """
        Args:
            writer: Writer of the artifact.
            specs: All tensors; those in one tuple stay in one shard.
            shard_bytes: A shard is closed before it grows above this.
        """
        self._writer = writer
        groups = [spec if isinstance(spec, tuple) else (spec,) for spec in specs]
        _check_specs([spec for group in groups for spec in group])
        parts = list(_split(groups, shard_bytes))
        names = (
            [SINGLE]
            if len(parts) == 1
            else [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
        )
        self._shards = [_open_shard(writer, name, part) for name, part in zip(names, parts, strict=True)]
        self._shard_of = {spec.name: shard for shard in self._shards for spec in shard.specs}
        self._specs = {spec.name: spec for shard in self._shards for spec in shard.specs}

    def shards(self) -> list[tuple[str, ...]]:
        """Return the tensor names of each shard."""
        return [tuple(spec.name for spec in shard.specs) for shard in self._shards]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor. Raises OutputError when it is not announced, comes twice, or differs from its spec."""
        shard, spec = self._announced(name, tensor)
        if name in shard.written:
            raise OutputError(f"The tensor {name!r} is written twice to {self._writer.output}.")
        if not spec.fits(tensor):
            raise self._differs(tensor, spec)
        if spec.exact:
            self.append(name, tensor)
        else:
            shard.deferred[name] = tensor.detach().cpu().clone()
            self._count(shard, name, shard.deferred[name].nbytes, complete=True)

    def append(self, name: str, chunk: torch.Tensor) -> None:
        """Write the next elements of a tensor. Raises OutputError when it is not announced, of another dtype, or too long."""
        shard, spec = self._announced(name, chunk)
        done = shard.written.get(name, 0)
        if not spec.exact or done + chunk.nbytes > spec.nbytes:
            raise OutputError(f"More of the tensor {name!r} than was announced is written to {self._writer.output}.")
        if chunk.nbytes:
            shard.file.write_at(tensor_bytes(chunk), len(shard.greatest_header) + shard.starts[name] + done)
        self._count(shard, name, done + chunk.nbytes, complete=done + chunk.nbytes == spec.nbytes)

    def _announced(self, name: str, tensor: torch.Tensor) -> tuple[_Shard, TensorSpec]:
        spec = self._specs.get(name)
        if spec is None:
            raise OutputError(f"The tensor {name!r} is not among those announced for {self._writer.output}.")
        if tensor.dtype != spec.dtype:
            raise self._differs(tensor, spec)
        return self._shard_of[name], spec

    def _differs(self, tensor: torch.Tensor, spec: TensorSpec) -> OutputError:
        return OutputError(
            f"The tensor {spec.name!r} is {tensor.dtype} {tuple(tensor.shape)}, but {spec.dtype} {spec.shape} was "
            f"announced for {self._writer.output}."
        )

    def _count(self, shard: _Shard, name: str, nbytes: int, *, complete: bool) -> None:
        shard.written[name] = nbytes
        shard.remaining -= complete
        if not shard.remaining:
            shard.finish()

    def finish(self) -> None:
        """Write the index, if there are shards. Raises OutputError when a tensor is missing."""
        missing = sorted(
            spec.name
            for shard in self._shards
            for spec in shard.specs
            if spec.name not in shard.written or (spec.exact and shard.written[spec.name] < spec.nbytes)
        )
        if missing:
            raise OutputError(f"Tensors announced for {self._writer.output} were never written: {listed(missing)}.")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(sum(shard.written.values()) for shard in self._shards)},
                "weight_map": {name: shard.name for name, shard in self._shard_of.items()},
            }
            text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            self._writer.write(INDEX, text.encode(), "weights")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.finish()
        else:
            for shard in self._shards:
                shard.file.abandon()


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    names = [spec.name for spec in specs]
    if not names:
        raise OutputError("There are no weights to write. Check that the checkpoint is complete.")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise OutputError(f"Tensors announced twice: {', '.join(twice)}. Give each stored tensor one name.")
    for spec in specs:
        if spec.name == METADATA_KEY or spec.dtype not in codes():
            raise OutputError(f"The tensor {spec.name!r} with {spec.dtype} cannot be stored in safetensors.")


def _split(groups: Sequence[tuple[TensorSpec, ...]], shard_bytes: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size = 0
    for group in groups:
        nbytes = sum(spec.nbytes for spec in group)
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.extend(group)
        size += nbytes
    yield shard


def _open_shard(writer: ArtifactWriter, name: str, group: list[TensorSpec]) -> _Shard:
    # By falling item size, so that every tensor is aligned to its dtype, as the safetensors library does it;
    # those of unknown size last, so that no other place depends on them.
    specs = tuple(sorted(group, key=lambda spec: (not spec.exact, -spec.dtype.itemsize)))
    starts: dict[str, int] = {}
    entries = []
    position = 0
    for spec in specs:
        starts[spec.name] = position
        position += spec.nbytes
        entries.append((spec.name, spec.dtype, spec.shape, starts[spec.name], position))
    shard = _Shard(name, specs, frame_header(encode_header(entries)), starts, writer.open(name, "weights"), len(specs))
    if all(spec.exact for spec in specs):
        # With the header first and tensors in order, whole or in chunks, the file is hashed as it is written.
        shard.file.write(shard.greatest_header)
    return shard
