"""An ONNX artifact as a model: transformers' generation over ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.errors import IncompatibleError, SourceError, UsageError
from vlmbuild.families import Family, family_named
from vlmbuild.ir.serialize import PROGRAM_FILE
from vlmbuild.runtime.bind import artifact_processor
from vlmbuild.runtime.inference_model import InferenceModel
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.onnx.decoding import OnnxDecoding, OnnxModels
from vlmbuild.runtime.onnx.session import FOLDER
from vlmbuild.util.dtypes import dtype_name


class OnnxVisionLanguageModel(InferenceModel):
    """`model(**processor_batch)` gives `.logits`; `model.generate(**processor_batch, ...)` is transformers' own generation.

    Inputs and outputs are on the CPU, whatever device the models run on. It cannot be trained.
    """

    target = "onnx"

    def __init__(self, models: OnnxModels, family: Family, config: Any, processor: Any, path: Path) -> None:
        super().__init__(family, config, processor, path)
        self.models = models

    def logits(self, batch: dict[str, Tensor], cache: KeyValueCache, keep: int) -> Tensor:
        return OnnxDecoding(self, cache, keep).logits(batch)

    def new_cache(self, length: int | None = None) -> KeyValueCache:
        """Return an empty cache. Raises UsageError for a static one."""
        if length is not None:
            raise UsageError("An ONNX artifact has a dynamic cache. Leave cache_implementation='static' out.")
        return KeyValueCache(self.models.cached())

    @property
    def device(self) -> torch.device:
        """Device of inputs and outputs."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of embeddings and logits."""
        return next(entry.dtype for entry in self.models.decoder.inputs if entry.name == "inputs_embeds")

    def _cannot_move(self, target: torch.device | torch.dtype) -> str:
        if isinstance(target, torch.dtype):
            return f"The models were exported in {self.dtype}. Build them with --dtype {dtype_name(target)}."
        return f"Inputs and outputs are on the CPU. To run the models on {target}, load with device={str(target)!r}."


def open_model(reader: ArtifactReader, device: str) -> OnnxVisionLanguageModel:
    """Open the model of an ONNX artifact whose files have been verified.

    Raises:
        DeviceError: There is no execution provider for the device.
        IncompatibleError: A file does not fit the others.
    """
    directory = reader.path
    try:
        family = family_named(json.loads(reader.read(PROGRAM_FILE))["family"])
        config = family.config(json.loads(reader.read("config.json")))
    except (ValueError, LookupError, TypeError, SourceError) as error:
        raise IncompatibleError(f"The files of {directory} do not belong together: {error} Build it again.") from error
    processor = artifact_processor(reader, family)
    models = OnnxModels.open(directory, device, folder=reader.folder(FOLDER))
    return OnnxVisionLanguageModel(models, family, config, processor, directory)
