"""Run an artifact in OpenVINO: ONNX models through its own frontend, checkpoints through optimum-intel, which exports them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exchange
import onnx_models
import processing

CONFIG = {"INFERENCE_PRECISION_HINT": "f32"}


class Compiled:
    """A model that OpenVINO has read from ONNX and compiled for the CPU, in float32."""

    def __init__(self, openvino: Any, file: Path) -> None:
        core = openvino.Core()
        model = core.read_model(str(file))
        # An input with a default of no rows, such as `image_sizes`, has that shape alone to OpenVINO, unless it is told.
        model.reshape({entry.any_name: [size or -1 for size in shape_of(entry)] for entry in model.inputs})
        self.inputs = {
            entry.any_name: [str(size) if size == -1 else size for size in shape_of(entry)] for entry in model.inputs
        }
        self.dtypes = {entry.any_name: entry.element_type.to_dtype().name for entry in model.inputs}
        self._outputs = [entry.any_name for entry in model.outputs]
        self._compiled = core.compile_model(model, "CPU", CONFIG)

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs by name."""
        results = self._compiled(dict(values))
        return {name: results[name] for name in self._outputs}


def shape_of(entry: Any) -> list[int]:
    """Return the shape of an input; -1 are sizes that change."""
    return [size.get_length() if size.is_static else -1 for size in entry.partial_shape]


class Exported:
    """A checkpoint that optimum-intel exports as its users do, but in float32; its methods are where the stages are seen."""

    def __init__(self, kind: Any, directory: str) -> None:
        self._model = kind.from_pretrained(directory, export=True, load_in_8bit=False, ov_config=CONFIG)
        self._features: list[Any] = []
        self._prompt: dict[str, Any] = {}
        self._images, self._model.get_vision_embeddings = self._model.get_vision_embeddings, self._watch_images
        text = self._model.language_model
        self._text, text.forward = text.forward, self._watch_text

    def _watch_images(self, *args: Any, **kwargs: Any) -> Any:
        self._case.enter("features")
        result = self._images(*args, **kwargs)
        self._features.append(rows_of(result))
        return result

    def _watch_text(self, *args: Any, **kwargs: Any) -> Any:
        if self._prompt:  # a step
            return self._text(*args, **kwargs)
        self._case.enter("logits")
        result = self._text(*args, **kwargs)
        self._prompt = {"embeddings": rows_of(kwargs["inputs_embeds"]), "logits": rows_of(result.logits)}
        self._case.enter("greedy")
        return result

    def answer(self, processor: Any, job: Mapping[str, Any], case: exchange.Case) -> None:
        """Run one case."""
        import numpy as np

        self._case, self._features, self._prompt = case, [], {}
        case.enter("tokens")
        inputs = processing.prompt(processor, case.given)
        ids = inputs["input_ids"]
        case.shown["tokens"] = ids[0].tolist()
        if "pixel_values" in inputs:
            case.value("pixels", inputs["pixel_values"].float().numpy())
        generated = self._model.generate(**inputs, max_new_tokens=job["steps"], do_sample=False)
        case.shown["greedy"] = generated[0, ids.shape[1] :].tolist()
        if self._features:
            case.value("features", np.concatenate(self._features))
        case.value("embeddings", self._prompt["embeddings"])
        case.value("logits", self._prompt["logits"][-job["last"] :])


def rows_of(value: Any) -> Any:
    """Return an array as (rows, last axis); of several, which are features for later layers, the first."""
    import numpy as np

    array = np.asarray(value[0] if isinstance(value, list | tuple) else value)
    return array.reshape(-1, array.shape[-1])


def main() -> None:
    """Answer the job."""
    openvino, *_ = exchange.require("openvino", "numpy", "torch", "transformers", "PIL")
    job = exchange.read_job()
    if Path(job["model"], "onnx").is_dir():
        onnx_models.serve(openvino.__version__, lambda file: Compiled(openvino, file))
        return
    intel, known, _ = exchange.require("optimum.intel", "optimum.intel.version", "torchvision")
    model = Exported(intel.OVModelForVisualCausalLM, job["model"])
    processor = processing.open_processor(job["model"])
    version = f"{openvino.__version__}, optimum-intel {known.__version__}"
    exchange.answer(job, version, lambda case: model.answer(processor, job, case), "float32")


if __name__ == "__main__":
    exchange.start(main)
