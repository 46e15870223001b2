"""OpenVINO: the models of an ONNX artifact, read and compiled by OpenVINO's own frontend for ONNX."""

from __future__ import annotations

from vlmbuild.engines.ask import Engine

ENGINE = Engine(
    name="openvino",
    worker="openvino_worker.py",
    install="{python} -m pip install openvino transformers torch pillow numpy",
    targets=("onnx",),
    most_images=1,  # OpenVINO 2026.4 crashes in the vision encoder's loop over several
)
