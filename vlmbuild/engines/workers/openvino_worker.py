"""Run an ONNX artifact in OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exchange
import onnx_models


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
        self._compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs by name."""
        results = self._compiled(dict(values))
        return {name: results[name] for name in self._outputs}


def main() -> None:
    """Answer the job."""
    openvino, *_ = exchange.require("openvino", "numpy", "torch", "transformers", "PIL")
    onnx_models.serve(openvino.__version__, lambda file: Compiled(openvino, file))


if __name__ == "__main__":
    exchange.start(main)
