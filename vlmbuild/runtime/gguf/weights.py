"""Weights of a GGUF artifact under the program's names, as stored: dequantized, and cuts put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmbuild.errors import IncompatibleError
from vlmbuild.families import family_named
from vlmbuild.ir.program import Region, join
from vlmbuild.ir.serialize import PROGRAM_FILE, from_json
from vlmbuild.quant.gguf import gguf_package
from vlmbuild.runtime.gguf.layout import FILES, GgufTensor, gguf_tensors


class GgufWeights:
    """Reads the weights of both files of a directory. Raises IncompatibleError when one is not readable."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stored: dict[tuple[str, str], Any] = {}
        for file in FILES:
            try:
                reader = gguf_package().GGUFReader(directory / file)
            except (OSError, ValueError, LookupError) as error:
                raise IncompatibleError(f"{directory / file} cannot be read: {error}. Build it again.") from error
            self._stored |= {(file, tensor.name): tensor for tensor in reader.tensors}
        program = from_json(json.loads((directory / PROGRAM_FILE).read_text(encoding="utf-8")))
        family = family_named(program.family)
        config = family.config(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        self._cuts: dict[str, list[GgufTensor]] = {}
        for tensor in gguf_tensors(program.source_weights(), family, family.gguf_model(config)):
            if not tensor.part.copied:
                self._cuts.setdefault(tensor.parameter, []).append(tensor)

    def tensor(self, name: str) -> Tensor:
        """Return a parameter by module name, in float32. Raises IncompatibleError when the files lack it."""
        cuts = self._cuts.get(name, [])
        if not cuts or any((cut.file, cut.name) not in self._stored for cut in cuts):
            raise IncompatibleError(
                f"The GGUF files of {self.directory} lack {name}, which their program needs. Build it again."
            )
        parameter = torch.empty(cuts[0].source_shape, dtype=torch.float32)
        for cut in cuts:
            stored = self._stored[cut.file, cut.name]
            values = gguf_package().quants.dequantize(stored.data, stored.tensor_type)
            cut.restore(torch.from_numpy(np.require(values, requirements="W")), parameter)
        return parameter

    def slots(self, region: Region, instance: str, constants: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors of an instance's slots, in float32."""
        names = [join(instance, slot.name) for slot in region.slots]
        return tuple(constants[name] if name in constants else self.tensor(name) for name in names)
