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
        self.inputs = {
            entry.any_name: [size.get_length() if size.is_static else str(size) for size in entry.partial_shape]
            for entry in model.inputs
        }
        self.dtypes = {entry.any_name: entry.element_type.to_dtype().name for entry in model.inputs}
        self._outputs = [entry.any_name for entry in model.outputs]
        self._compiled = core.compile_model(model, "CPU", CONFIG)

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs by name."""
        results = self._compiled(dict(values))
        return {name: results[name] for name in self._outputs}


class Exported:
    """A checkpoint that optimum-intel exports as its users do, but in float32; its methods are where the stages are seen."""

    def __init__(self, kind: Any, directory: str) -> None:
        self._model = kind.from_pretrained(directory, export=True, load_in_8bit=False, ov_config=CONFIG)
        self._seen: dict[str, Any] = {}
        self._watch(self._model, "get_vision_embeddings", lambda _, result: {"features": result})
        self._watch(
            self._model.language_model,
            "forward",
            lambda given, result: {"embeddings": given["inputs_embeds"], "logits": result.logits},
        )

    def _watch(self, owner: Any, name: str, stages: Any) -> None:
        """Note what the first call of a method shows."""
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            for stage, value in stages(kwargs, result).items():
                self._seen.setdefault(stage, value)
            return result

        setattr(owner, name, watched)

    def answer(self, processor: Any, job: Mapping[str, Any], case: exchange.Case) -> None:
        """Run one case."""
        case.enter("tokens")
        inputs = processing.prompt(processor, case.given)
        ids = inputs["input_ids"]
        case.shown["tokens"] = ids[0].tolist()
        if "pixel_values" in inputs:
            case.value("pixels", inputs["pixel_values"].float().numpy())
        case.enter("greedy")
        self._seen.clear()
        try:
            generated = self._model.generate(**inputs, max_new_tokens=job["steps"], do_sample=False)
            case.shown["greedy"] = generated[0, ids.shape[1] :].tolist()
        finally:
            for stage, value in self._seen.items():
                rows = rows_of(value)
                case.value(stage, rows[-job["last"] :] if stage == "logits" else rows)


def rows_of(value: Any) -> Any:
    """Return the rows of an array or tensor, which may be the first of several."""
    import numpy as np

    while isinstance(value, list | tuple):
        value = value[0]
    array = np.asarray(value)
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
    exchange.answer(job, version, lambda case: model.answer(processor, job, case))


if __name__ == "__main__":
    exchange.start(main)
