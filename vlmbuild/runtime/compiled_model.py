"""An artifact with compiled code as a model: transformers' generation over machine code of its regions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.runtime.decoding import Decoding
from vlmbuild.runtime.inference_model import InferenceModel
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.model import VisionLanguageModel


class CompiledVisionLanguageModel(InferenceModel):
    """`model(**processor_batch)` gives `.logits`; `model.generate(**processor_batch, ...)` is transformers' own generation,
    also with `cache_implementation="static"`. It is for inference, on the device and in the dtype that it was compiled for.

    Args:
        graphs: The same model, whose programs with a cache have compiled regions.
    """

    target = "aoti"

    def __init__(self, graphs: VisionLanguageModel, path: Path) -> None:
        super().__init__(graphs.family, graphs.config, graphs.processor, path)
        self.graphs = graphs
        self.generation_config = graphs.generation_config

    def logits(self, batch: dict[str, Tensor], cache: KeyValueCache, keep: int) -> Tensor:
        with torch.no_grad():
            return Decoding(self.graphs, cache, keep).logits(batch)

    def new_cache(self, length: int | None = None) -> KeyValueCache:
        return self.graphs.new_cache(length)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.graphs.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.graphs.dtype

    def to(self, *where: object, **options: object) -> CompiledVisionLanguageModel:
        """Itself, if that changes nothing. Raises UsageError: compiled code stays what it is."""
        device, dtype, *_ = torch._C._nn._parse_to(*where, **options)  # type: ignore[attr-defined]
        if (device or self.device).type != self.device.type or (dtype or self.dtype) != self.dtype:
            raise UsageError(
                f"The model was compiled for {self.device.type} and {self.dtype}. Build it for what you need, with "
                "--device and --dtype."
            )
        return self
