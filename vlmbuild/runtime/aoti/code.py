"""Opening of an artifact's compiled code: a runner for each region, from verified bytes, on a matching platform."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from vlmbuild.errors import IncompatibleError, UsageError
from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import Program, Region
from vlmbuild.kv_cache.block import FORMS
from vlmbuild.kv_cache.program import cached_inputs
from vlmbuild.runtime.aoti.archive import check_package
from vlmbuild.runtime.aoti.code_index import CODE_INDEX, CodeEntry, CodeFile, CodeIndex, compiled_regions
from vlmbuild.runtime.aoti.platform import check_platform
from vlmbuild.runtime.compiler import Compiler
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.runtime.torch.program_model import CachedProgram
from vlmbuild.runtime.torch.region import slots_getter

Read = Callable[[str], bytes]
"""The content of a file of an artifact, checked against its manifest."""
Runner = Callable[[list[Tensor]], list[Tensor]]

_ROOM = 64
"""Tokens by which a dynamic cache grows at once: copying costs 1/64 of concatenating at every step, and attention reads fewer
than that many empty positions."""


@dataclass(frozen=True, slots=True)
class Code:
    """Machine code that was opened.

    Attributes:
        runner: Takes a list of tensors, and empties it.
        inputs: Indices of a region's activations, in the order of its inputs, and their dtypes.
    """

    runner: Runner
    inputs: tuple[tuple[int, torch.dtype], ...]

    @classmethod
    def of(cls, file: CodeFile, runners: Mapping[str, Runner]) -> Self:
        """Create it from the index."""
        return cls(runners[file.file], tuple((index, getattr(torch, dtype)) for index, dtype in file.inputs))


class CompiledRegion:
    """A region whose graph was compiled, for inference.

    Args:
        region: Region of the program with a cache.
        entry: Its entry of the index.
        runners: Opened code by file.
    """

    def __init__(self, region: Region, entry: CodeEntry, runners: Mapping[str, Runner]) -> None:
        self.region = region
        self.code = Code.of(entry.code, runners)
        self._token = None if entry.token is None else Code.of(entry.token, runners)
        self._token_axis = entry.token_axis
        self._written = written_activations(region)
        self._tensors_of = slots_getter([slot.name for slot in region.slots])
        self._tensors: dict[nn.Module, tuple[Tensor, ...]] = {}

    def __call__(self, owner: nn.Module, compiler: Compiler, activations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the code with the owner's tensors, which must not change afterwards."""
        tensors = self._tensors.get(owner)
        if tensors is None:
            tensors = self._tensors[owner] = tuple(x.detach().contiguous() for x in self._tensors_of(owner))
        return self.run(tensors, activations)

    def run(self, tensors: tuple[Tensor, ...], activations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the code, or the one for one token.

        Raises:
            UsageError: An activation has another dtype, device or layout than the compiled code reads.
        """
        code = self.code
        if self._token is not None and self._token_axis is not None:
            index, axis = self._token_axis
            code = self._token if activations[index].shape[axis] == 1 else code
        inputs = [self._laid_out(activations[index], index, dtype) for index, dtype in code.inputs]
        return tuple(code.runner([*tensors, *inputs]))

    def _laid_out(self, value: Tensor, index: int, dtype: torch.dtype) -> Tensor:
        if value.dtype != dtype or value.device.type != "cpu":
            raise UsageError(
                f"{self.region.name} was compiled for {dtype} on a CPU and got {value.dtype} on {value.device}. Leave the "
                "model as it was loaded."
            )
        if not value.is_contiguous() and index in self._written:
            raise UsageError(
                f"{self.region.name} writes into its cache, which has to be contiguous. Create it with new_cache."
            )
        return value.contiguous()


def written_activations(region: Region) -> frozenset[int]:
    """Return indices of the activations that a region's graph writes into."""
    indices = {node: index for index, node in enumerate(region.placeholders()[len(region.slots) :])}
    return frozenset(
        indices[node.args[0]]
        for node in region.graph.graph.nodes
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable and node.args[0] in indices
    )


def adopt_code(model: VisionLanguageModel, read: Read, where: str) -> None:
    """Use the compiled regions of an artifact in its model's programs with a cache.

    Raises:
        IncompatibleError: The code is for another platform, dtype or graph, or cannot be opened.
    """
    index = read_index(read, where)
    check_platform(index.platform, where)
    if getattr(torch, index.dtype, None) != model.dtype:
        raise IncompatibleError(
            f"{where}: its code computes in {index.dtype}, and its weights are in {model.dtype}. Build the artifact again."
        )
    runners: dict[str, Runner] = {}
    for form in FORMS:
        cached = model.cached(form)
        bound = dict(cached.bound)
        for name, region in compiled_regions(cached.program).items():
            entry = _entry(index, cached.program, form, name, where)
            for code in entry.files:
                if code.file not in runners:
                    runners[code.file] = _runner(read(code.file), f"{where}: {code.file}")
            bound[name] = CompiledRegion(region, entry, runners)
        model.use_cached(form, CachedProgram(cached.program, bound))


def new_code_cache(model: VisionLanguageModel, length: int | None) -> KeyValueCache:
    """Return an empty cache for compiled regions: dynamic, or with room for `length` tokens. Both are written in place, as the
    compiled code for single tokens needs."""
    program = model.cached("dynamic").program
    return KeyValueCache(cached_inputs(program.variants["text"]), length, _ROOM)


def read_index(read: Read, where: str) -> CodeIndex:
    """Read the index of compiled code. Raises IncompatibleError if this vlmbuild cannot read it."""
    try:
        return CodeIndex.from_record(json.loads(read(CODE_INDEX)))
    except (UsageError, ValueError, RecursionError) as error:
        raise IncompatibleError(f"{where}: {CODE_INDEX} cannot be read: {error}. Build the artifact again.") from error


def _entry(index: CodeIndex, program: Program, form: str, name: str, where: str) -> CodeEntry:
    entry = index.regions.get(form, {}).get(name)
    if entry is None or entry.graph != digest(program.regions[name], shapes=False):
        raise IncompatibleError(
            f"{where}: this version of vlmbuild has another graph for {name} than its code was compiled from. Build the "
            "artifact again."
        )
    if not entry.fits(program.regions[name]):
        raise IncompatibleError(
            f"{where}: {CODE_INDEX} has other inputs for {name} than it takes. Build the artifact again."
        )
    return entry


def _runner(package: bytes, where: str) -> Runner:
    """Open a package from a private file, which nobody else can write to."""
    check_package(package, where)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "region.pt2"
        file.write_bytes(package)
        try:
            opened = torch._inductor.aoti_load_package(
                str(file), run_single_threaded=True
            )  # no locks: a model serves one caller at a time
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise IncompatibleError(f"{where} cannot be opened: {reason} Build the artifact again.") from error
    runner: Runner = opened.loader.boxed_run
    return runner
