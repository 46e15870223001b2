"""An artifact with compiled code as a model: transformers' generation over machine code of its regions."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.runtime.compiled_code import new_code_cache
from vlmbuild.runtime.decoding import Decoding
from vlmbuild.runtime.inference_model import InferenceModel
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.model import VisionLanguageModel


class CompiledVisionLanguageModel(InferenceModel):
    """`model(**processor_batch)` gives `.logits`; `model.generate(**processor_batch, ...)` is transformers' own generation,
    also with `cache_implementation="static"`. It is for inference, on a CPU and in the dtype that it was compiled for.

    Args:
        graphs: The same model, whose programs with a cache have compiled regions.
    """

    target = "aoti"

    def __init__(self, graphs: VisionLanguageModel, path: Path) -> None:
        super().__init__(graphs.family, graphs.config, graphs.processor, path)
        self.graphs = graphs
        self.generation_config = graphs.generation_config

    def logits(self, batch: dict[str, Tensor], cache: KeyValueCache, keep: int) -> Tensor:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):  # code computes in the dtypes that it was compiled for
            return Decoding(self.graphs, cache, keep).logits(batch)

    def new_cache(self, length: int | None = None) -> KeyValueCache:
        return new_code_cache(self.graphs, length)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.graphs.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.graphs.dtype

    def to(self, *targets: str | torch.device | torch.dtype) -> Self:
        """Itself, if that changes nothing. Raises UsageError: compiled code stays what it is."""
        for target in targets:
            same = target == self.dtype if isinstance(target, torch.dtype) else torch.device(target) == self.device
            if not same:
                raise UsageError(
                    f"The model was compiled for {self.device} and {self.dtype}. Build it for {target}, with --device and "
                    "--dtype."
                )
        return self
