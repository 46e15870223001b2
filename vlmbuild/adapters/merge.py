"""Merging of an adapter into the weights of a new artifact: W + scaling * B @ A, a chunk at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.adapters.fit import check_finite, check_fits, with_module_names
from vlmbuild.adapters.peft_files import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter
from vlmbuild.artifact.files import hash_file
from vlmbuild.artifact.manifest import ADAPTER_URI
from vlmbuild.errors import SourceError, UsageError, reason
from vlmbuild.families import Family
from vlmbuild.ir.program import Program
from vlmbuild.recipe import Recipe
from vlmbuild.util.validation import reachable


@dataclass(frozen=True, slots=True)
class Merge:
    """An adapter in PEFT's format that fits the program.

    Attributes:
        directory: Directory of its files.
        adapter: Its matrices, mapped from the files.
        record: Its files with their digests, as in the manifest.
    """

    directory: Path
    adapter: Adapter
    record: Mapping[str, Any]

    def changes(self, name: str) -> bool:
        """Return whether the adapter changes the parameter of this module name."""
        return name in self.adapter.trained or name.removesuffix(".weight") in self.adapter.loras

    def trained(self, name: str) -> Tensor | None:
        """Return a parameter that was trained whole, else None."""
        return self.adapter.trained.get(name)

    def merged(self, name: str, values: Tensor, first: int) -> Tensor:
        """Add LoRA's product to flat values of a parameter, which start at its element `first`; in float32."""
        module = name.removesuffix(".weight")
        if module not in self.adapter.loras:
            return values.float()
        down = self.adapter.tensors[f"{module}.lora_A.default.weight"].float()
        up = self.adapter.tensors[f"{module}.lora_B.default.weight"]
        features = down.shape[1]
        row, end = first // features, -(-(first + values.numel()) // features)
        start = first - row * features
        product = (up[row:end].float() @ down).flatten()[start : start + values.numel()]
        return values.float().add(product, alpha=self.adapter.loras[module].scaling)

    def check_unchanged(self) -> None:
        """Raise SourceError if the adapter's files have changed since they were read."""
        if adapter_record(self.directory) != self.record:
            raise SourceError(f"{self.directory} changed while it was merged. Run the build again.")


def check_mergeable(recipe: Recipe, directory: str | Path, output: str | Path) -> None:
    """Refuse an adapter that cannot be merged, before any work.

    Raises:
        UsageError: The recipe measures layers, or the output lies in the adapter's folder.
        SourceError: There is no such folder, or it is no adapter.
    """
    path = reachable(directory, SourceError, "The adapter")
    if recipe.quantize is not None and recipe.quantize.format == "auto":
        raise UsageError(
            "auto measures the source's weights, and the adapter changes them. Merge without --quantize first, then build "
            "the merged artifact with --quantize auto."
        )
    if not path.is_dir():
        raise SourceError(f"The adapter {path} is not a folder. Pass the folder with {CONFIG_FILE}.")
    if not (path / CONFIG_FILE).is_file():
        raise SourceError(
            f"The folder {path} has no {CONFIG_FILE}, so it is not an adapter. Pass the folder that has it."
        )
    if path.resolve() in (Path(output).resolve(), *Path(output).resolve().parents):
        raise UsageError(f"The output {output} lies in the adapter's folder {path}. Choose another output.")


def read_merge(directory: str | Path, program: Program, family: Family) -> Merge:
    """Read an adapter to merge into a program's weights.

    Raises:
        SourceError: It cannot be read, is not LoRA, holds NaN, or does not fit the program; the tensor is named.
    """
    path = Path(directory)
    adapter = with_module_names(read_adapter(path), family, path)
    check_fits(program, adapter, path)
    check_finite(adapter, path)
    return Merge(path, adapter, adapter_record(path))


def adapter_record(directory: Path) -> dict[str, Any]:
    """Return the manifest's record of an adapter. Raises SourceError if a file cannot be read."""
    try:
        files = [directory / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
        entries = [{"path": file.name, "size": file.stat().st_size, "digest": hash_file(file)} for file in files]
    except OSError as error:
        raise SourceError(f"{directory} cannot be read: {reason(error)}. Check the disk and permissions.") from error
    return {"uri": ADAPTER_URI, "files": entries}


def without_adapter(adapter: Adapter) -> Adapter:
    """Return an adapter that changes nothing: B is zero, and nothing was trained whole."""
    tensors = {
        name: torch.zeros_like(tensor) if ".lora_B." in name else tensor for name, tensor in adapter.tensors.items()
    }
    return Adapter(adapter.loras, tensors, (), {})
