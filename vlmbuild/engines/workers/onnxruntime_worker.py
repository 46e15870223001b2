"""Run an ONNX artifact in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exchange
import onnx_models

_NUMPY = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class Session:
    """A model in ONNX Runtime."""

    def __init__(self, runtime: Any, file: Path) -> None:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = {entry.name: list(entry.shape) for entry in self._session.get_inputs()}
        self.dtypes = {entry.name: _NUMPY[entry.type] for entry in self._session.get_inputs()}
        self._outputs = [entry.name for entry in self._session.get_outputs()]

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs by name."""
        return dict(zip(self._outputs, self._session.run(None, dict(values)), strict=True))


def main() -> None:
    """Answer the job."""
    runtime, *_ = exchange.require("onnxruntime", "numpy", "torch", "transformers", "PIL")
    onnx_models.serve(runtime.__version__, lambda file: Session(runtime, file))


if __name__ == "__main__":
    exchange.start(main)
