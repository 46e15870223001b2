"""ONNX Runtime: the three models of an ONNX artifact by hand, as a program does that has no runtime of ours."""

from __future__ import annotations

from vlmbuild.engines.ask import Engine

ENGINE = Engine(
    name="onnxruntime",
    worker="onnxruntime_worker.py",
    install="{python} -m pip install onnxruntime transformers torch pillow numpy",
    targets=("onnx",),
)
