"""An artifact with compiled code as a model: transformers' generation over machine code of its regions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlmbuild.runtime.aoti.code import new_code_cache
from vlmbuild.runtime.inference_model import InferenceModel
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.torch.decoding import Decoding
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.util.dtypes import dtype_name


class CompiledVisionLanguageModel(InferenceModel):
    """`model(**processor_batch)` gives `.logits`; `model.generate(**processor_batch, ...)` is transformers' own generation,
    also with `cache_implementation="static"`. It is for inference, on a CPU and in the dtype that it was compiled for.

    Args:
        graphs: The model in torch, with compiled regions in its programs with a cache.
    """

    target = "aoti"

    def __init__(self, graphs: VisionLanguageModel, path: Path) -> None:
        super().__init__(graphs.family, graphs.config, graphs.processor, path)
        self.graphs = graphs

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
        """Device of the weights."""
        return self.graphs.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.graphs.dtype

    def _cannot_move(self, target: torch.device | torch.dtype) -> str:
        advice = (
            "for the trainable target" if isinstance(target, torch.device) else f"with --dtype {dtype_name(target)}"
        )
        return f"The model was compiled for {self.device} and {self.dtype}. Build it {advice}."
