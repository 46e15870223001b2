"""Writing weights to safetensors files, one tensor at a time; reading them is re-exported from `checkpoint`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from vlmbuild.artifact.checkpoint import INDEX, SINGLE, CheckpointWeights
from vlmbuild.artifact.tensors import (
    CODES,
    METADATA_KEY,
    TensorInfo,
    encode_header,
    frame_header,
    read_header,
    tensor_bytes,
)
from vlmbuild.artifact.writer import ArtifactWriter, OutputFile
from vlmbuild.errors import OutputError

__all__ = ["CheckpointWeights", "TensorInfo", "TensorSpec", "WeightsWriter", "read_header"]


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


@dataclass
class _Shard:
    """The layout of one file, and what has been written of it."""

    name: str
    specs: tuple[TensorSpec, ...]
    greatest_header: bytes
    starts: dict[str, int]
    waiting: set[str]
    deferred: dict[str, torch.Tensor] = field(default_factory=dict)
    file: OutputFile | None = None


class WeightsWriter:
    """Writes model.safetensors, or shards and an index, in the form that transformers and safetensors read.

    The specs decide the shards and the place of every tensor, so tensors may be added in any order and each is written
    at once. Only a tensor whose size is not known beforehand (`exact=False`; a few hundred bytes each) waits in memory
    until its shard is complete and lies at the end of it; the header is reserved at its greatest length and filled with
    spaces, which the format allows. That costs no temporary copy of the data.
    Raises OutputError when the specs contradict each other.
    """

    def __init__(self, writer: ArtifactWriter, specs: Sequence[TensorSpec], *, shard_bytes: int = 5 * 2**30) -> None:
        self._writer = writer
        _check_specs(specs)
        self._shards = [_plan_shard(name, group) for name, group in _name_shards(_split(specs, shard_bytes))]
        self._shard_of = {spec.name: shard for shard in self._shards for spec in shard.specs}
        self._specs = {spec.name: spec for spec in specs}
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor. Raises OutputError when it is not announced, comes twice, or differs from its spec."""
        spec = self._specs.get(name)
        shard = self._shard_of.get(name)
        if spec is None or shard is None:
            raise OutputError(f"The tensor {name!r} is not among those announced for {self._writer.output}.")
        if name not in shard.waiting:
            raise OutputError(f"The tensor {name!r} is written twice to {self._writer.output}.")
        if tensor.dtype != spec.dtype or not _fits(spec, tuple(tensor.shape)):
            raise OutputError(
                f"The tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, but {spec.dtype} {spec.shape} was "
                f"announced for {self._writer.output}."
            )
        if shard.file is None:
            shard.file = _open_shard(self._writer, shard)
        if spec.exact:
            shard.file.write_at(tensor_bytes(tensor), len(shard.greatest_header) + shard.starts[name])
        else:
            shard.deferred[name] = tensor.detach().cpu().clone()
        shard.waiting.remove(name)
        self._total_bytes += tensor.numel() * tensor.dtype.itemsize
        if not shard.waiting:
            _finish(shard, shard.file)

    def finish(self) -> None:
        """Write the index, if there are shards. Raises OutputError when a tensor is missing."""
        missing = [name for shard in self._shards for name in sorted(shard.waiting)]
        if missing:
            shown = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
            raise OutputError(f"Tensors announced for {self._writer.output} were never written: {shown}.")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
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
                if shard.file is not None:
                    shard.file.abandon()


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    names = [spec.name for spec in specs]
    if not names:
        raise OutputError("There are no weights to write. Check that the checkpoint is complete.")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise OutputError(f"Tensors announced twice: {', '.join(twice)}. Give each stored tensor one name.")
    for spec in specs:
        if spec.name == METADATA_KEY or spec.dtype not in CODES:
            raise OutputError(f"The tensor {spec.name!r} with {spec.dtype} cannot be stored in safetensors.")


def _split(specs: Sequence[TensorSpec], shard_bytes: int) -> Iterator[list[TensorSpec]]:
    group: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if group and size + spec.nbytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(spec)
        size += spec.nbytes
    yield group


def _name_shards(groups: Iterator[list[TensorSpec]]) -> Iterator[tuple[str, list[TensorSpec]]]:
    known = list(groups)
    for number, group in enumerate(known, 1):
        yield ((SINGLE if len(known) == 1 else f"model-{number:05d}-of-{len(known):05d}.safetensors"), group)


def _plan_shard(name: str, group: list[TensorSpec]) -> _Shard:
    # By falling item size, so that every tensor is aligned to its dtype, as the safetensors library does it;
    # those of unknown size last, so that no other place depends on them.
    specs = tuple(sorted(group, key=lambda spec: (not spec.exact, -spec.dtype.itemsize)))
    starts: dict[str, int] = {}
    position = 0
    for spec in specs:
        starts[spec.name] = position
        position += spec.nbytes
    greatest = encode_header((spec.name, spec.dtype, spec.shape, *_span(spec, starts)) for spec in specs)
    return _Shard(name, specs, frame_header(greatest), starts, {spec.name for spec in specs})


def _span(spec: TensorSpec, starts: Mapping[str, int]) -> tuple[int, int]:
    return starts[spec.name], starts[spec.name] + spec.nbytes


def _fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    if spec.exact:
        return shape == spec.shape
    return len(shape) == len(spec.shape) and all(size <= most for size, most in zip(shape, spec.shape, strict=True))


def _open_shard(writer: ArtifactWriter, shard: _Shard) -> OutputFile:
    file = writer.open(shard.name, "weights")
    if all(spec.exact for spec in shard.specs):
        # With the header first and tensors in order, the file is hashed as it is written.
        file.write(shard.greatest_header)
    return file


def _finish(shard: _Shard, file: OutputFile) -> None:
    if not shard.deferred:
        file.close()
        return
    entries = []
    position = 0
    for spec in shard.specs:
        tensor = shard.deferred.get(spec.name)
        shape = spec.shape if tensor is None else tuple(tensor.shape)
        end = position + math.prod(shape) * spec.dtype.itemsize
        entries.append((spec.name, spec.dtype, shape, position, end))
        if tensor is not None:
            file.write_at(tensor_bytes(tensor), len(shard.greatest_header) + position)
        position = end
    file.write_at(frame_header(encode_header(entries), len(shard.greatest_header)), 0)
    file.close()
    shard.deferred.clear()
