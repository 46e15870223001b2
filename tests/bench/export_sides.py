"""The sides of `export.py`: how each writes a model, opens it, and runs an image, a prompt and a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Side:
    """One way to run a model.

    Args:
        options: Options of the worker.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def export(self, checkpoint: Path, output: Path) -> None:
        """Write what `open` reads."""
        raise NotImplementedError

    def open(self, output: Path) -> None:
        """Make the model ready."""
        raise NotImplementedError

    def encode(self, batch: dict[str, Tensor]) -> object:
        """Compute the features of an image. Raises NotImplementedError with the reason where there is none."""
        raise NotImplementedError

    def prompt(self, ids: Tensor) -> Tensor:
        """Begin a text (1, tokens); the logits of its last token."""
        raise NotImplementedError

    def step(self, token: int) -> Tensor:
        """Go on with a token; its logits."""
        raise NotImplementedError

    def bytes_per_token(self) -> int:
        """Count the bytes of weights that a token reads; 0 where it is not known."""
        return 0


class Ours(Side):
    """An artifact of a target, loaded with `vlmbuild.load`."""

    def __init__(self, options: dict[str, Any], target: str = "onnx", quantize: str = "none", **details: Any) -> None:
        super().__init__(options)
        self.target, self.quantize, self.details = target, quantize, details

    def export(self, checkpoint: Path, output: Path) -> None:
        import vlmbuild

        spec = None if self.quantize == "none" else vlmbuild.QuantSpec(self.quantize, **self.details)  # type: ignore[arg-type]
        vlmbuild.build(checkpoint, output, vlmbuild.Recipe(target=self.target, dtype="float32", quantize=spec))  # type: ignore[arg-type]

    def open(self, output: Path) -> None:
        import vlmbuild

        self.path = output
        self.model, _ = vlmbuild.load(output, verify=False, trust=("code",) if self.target == "aoti" else ())

    def encode(self, batch: dict[str, Tensor]) -> object:
        if self.target != "onnx":
            raise NotImplementedError("the vision tower is not run by itself")
        from vlmbuild.runtime.onnx.decoding import OnnxDecoding

        model = self.model
        decoding = OnnxDecoding(model, model.new_cache())
        return decoding.image_values(batch)

    def prompt(self, ids: Tensor) -> Tensor:
        self.cache = self.model.new_cache()
        return self._run(ids)

    def step(self, token: int) -> Tensor:
        return self._run(torch.tensor([[token]]))

    def _run(self, ids: Tensor) -> Tensor:
        found = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)
        return found.logits[0, -1]

    def bytes_per_token(self) -> int:
        data = self.path / "onnx/decoder_model_merged.onnx_data"
        return data.stat().st_size if data.is_file() else 0


class Eager(Side):
    """transformers' own model, float32."""

    def export(self, checkpoint: Path, output: Path) -> None:
        output.mkdir()
        for file in checkpoint.iterdir():
            (output / file.name).symlink_to(file)

    def open(self, output: Path) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32).eval()

    def encode(self, batch: dict[str, Tensor]) -> object:
        return self.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])

    def prompt(self, ids: Tensor) -> Tensor:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config.get_text_config())
        return self._run(ids)

    def step(self, token: int) -> Tensor:
        return self._run(torch.tensor([[token]]))

    def _run(self, ids: Tensor) -> Tensor:
        past = self.cache.get_seq_length()
        positions = torch.arange(past, past + ids.shape[1]).expand(3, 1, -1)
        found = self.model(input_ids=ids, position_ids=positions, past_key_values=self.cache, logits_to_keep=1)
        return found.logits[0, -1]

    def bytes_per_token(self) -> int:
        language = self.model.model.language_model
        return sum(parameter.nbytes for parameter in language.parameters())
