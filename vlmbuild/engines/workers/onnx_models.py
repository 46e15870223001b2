"""Run the three ONNX models of an artifact, in any engine that computes a model's outputs from its inputs.

What transformers.js does, with numpy: features take the places of image tokens, the decoder's cache grows. Positions on three
axes are computed by transformers' own function for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import exchange
import processing


class Model(Protocol):
    """A model in an engine.

    Attributes:
        inputs: Shape of each input by name; sizes that change are names.
        dtypes: Dtype of each input, as numpy calls it.
    """

    inputs: Mapping[str, list[Any]]
    dtypes: Mapping[str, str]

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs by name."""


class Models:
    """The models of an artifact, opened by `open_model`."""

    def __init__(self, directory: str, open_model: Any) -> None:
        self.directory = Path(directory)
        self.config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        folder = self.directory / "onnx"
        (decoder,) = folder.glob("decoder_model_merged*.onnx")
        suffix = decoder.stem.removeprefix("decoder_model_merged")
        self.vision, self.embed, self.decoder = (
            open_model(folder / f"{stem}{suffix}.onnx")
            for stem in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )
        text = folder / f"decoder_text{suffix}.onnx"
        self.text = open_model(text) if text.is_file() else self.decoder

    def run(self, model: Model, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run a model on the inputs that it declares, in its dtypes."""
        return model.run({name: values[name].astype(model.dtypes[name]) for name in model.inputs})

    def answer(self, processor: Any, job: Mapping[str, Any], case: exchange.Case) -> None:
        """Run one case."""
        import numpy as np

        case.enter("tokens")
        batch = {name: value.numpy() for name, value in processing.prompt(processor, case.given).items()}
        ids = batch["input_ids"]
        case.shown["tokens"] = ids[0].tolist()
        embeds = self.run(self.embed, {"input_ids": ids})["inputs_embeds"]
        if "pixel_values" in batch:
            case.value("pixels", batch["pixel_values"].astype(np.float32))
            case.enter("features")
            embeds = self._with_features(embeds, batch, case)
        decoder = self.decoder if "pixel_values" in batch else self.text
        case.value("embeddings", embeds[0].astype(np.float32))
        case.enter("logits")
        positions = self._positions(batch)
        logits, cache = self._decode(decoder, embeds, positions, {}, job["last"])
        case.value("logits", logits[0, -job["last"] :].astype(np.float32))
        case.enter("greedy")
        case.shown["greedy"] = greedy = [int(logits[0, -1].argmax())]
        following = int(positions.max()) + 1
        while len(greedy) < job["steps"] and greedy[-1] not in self._ends():
            step = np.full((*positions.shape[:-1], 1), following + len(greedy) - 1, np.int64)
            embeds = self.run(self.embed, {"input_ids": np.array([greedy[-1:]], np.int64)})["inputs_embeds"]
            logits, cache = self._decode(decoder, embeds, step, cache, 1)
            greedy.append(int(logits[0, -1].argmax()))

    def _with_features(self, embeds: Any, batch: Mapping[str, Any], case: exchange.Case) -> Any:
        """Put image features into the embeddings; columns beyond those are for later layers, zero for text."""
        import numpy as np

        sizes = {"image_sizes": batch.get("image_sizes", np.zeros((0, 2), np.int64))}
        given = {**batch, **{name.removeprefix("image_"): value for name, value in batch.items()}, **sizes}
        if missing := sorted(set(self.vision.inputs) - set(given)):
            raise SystemExit(
                f"the vision encoder reads {', '.join(missing)}, which vlmbuild.load computes and no processor"
            )
        features = self.run(self.vision, given)["image_features"]
        features = features.reshape(-1, features.shape[-1])
        case.value("features", features.astype(np.float32))
        token = self.config.get("image_token_id", self.config.get("image_token_index"))
        wide = self.decoder.inputs["inputs_embeds"][-1]
        placed = np.zeros((*embeds.shape[:2], wide), embeds.dtype)
        placed[..., : embeds.shape[-1]] = embeds
        rows, columns = np.nonzero(batch["input_ids"] == token)
        if len(rows) != len(features):
            raise ValueError(f"{len(rows)} image tokens, {len(features)} features")
        placed[rows, columns] = features
        return placed

    def _decode(
        self, decoder: Model, embeds: Any, positions: Any, cache: Mapping[str, Any], keep: int
    ) -> tuple[Any, dict[str, Any]]:
        """Run the decoder on new tokens; returns logits and the grown cache."""
        import numpy as np

        wide = decoder.inputs["inputs_embeds"][-1]
        embeds = np.pad(embeds, ((0, 0), (0, 0), (0, wide - embeds.shape[-1])))
        names = [name for name in decoder.inputs if name.startswith("past_key_values.")]
        sizes = {name: [size if isinstance(size, int) else 0 for size in decoder.inputs[name]] for name in names}
        past = {name: cache.get(name, np.zeros([1, *sizes[name][1:]], np.float32)) for name in names}
        total = past[names[0]].shape[2] + embeds.shape[1]
        values = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": positions,
            "num_logits_to_keep": np.array(keep, np.int64),
            **past,
        }
        results = self.run(decoder, values)
        return results["logits"], {name: results[name.replace("past_key_values", "present", 1)] for name in names}

    def _positions(self, batch: Mapping[str, Any]) -> Any:
        """Return the positions of a prompt's tokens, on as many axes as the decoder has."""
        import numpy as np

        ids = batch["input_ids"]
        plain = np.arange(ids.shape[1], dtype=np.int64)[None]
        if len(self.decoder.inputs["position_ids"]) == 2:
            return plain
        if "image_grid_thw" not in batch:
            return np.broadcast_to(plain, (3, *plain.shape))
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.directory)
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(config)
        known = {name: torch.from_numpy(value) for name, value in batch.items() if not name.startswith("pixel_")}
        return model.model.get_rope_index(**known)[0].numpy()

    def _ends(self) -> set[int]:
        file = self.directory / "generation_config.json"
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ends = values.get("eos_token_id", self.config.get("eos_token_id"))
        return {ends} if isinstance(ends, int) else set(ends or ())


def serve(version: str, open_model: Any) -> None:
    """Answer the job with models that `open_model` opens."""
    job = exchange.read_job()
    processor: Any = None
    models = Models(job["model"], open_model)

    def each(case: exchange.Case) -> None:
        nonlocal processor
        processor = processor or processing.open_processor(job["model"])
        models.answer(processor, job, case)

    exchange.answer(job, version, each)
