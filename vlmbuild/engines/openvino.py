"""OpenVINO: the models of an ONNX artifact by its own frontend, and checkpoints by optimum-intel's export of them."""

from __future__ import annotations

from vlmbuild.engines.ask import Engine

ENGINE = Engine(
    name="openvino",
    worker="openvino_worker.py",
    # optimum-intel 2.2 exports some families with transformers up to 5.0 alone; before 5.0 `rope_parameters` are not read.
    install="{python} -m pip install openvino optimum-intel transformers==5.0.0 torch torchvision num2words pillow numpy",
    targets=("onnx",),
    unquantized=("trainable",),
    one_image=True,  # OpenVINO 2026.4 crashes in the vision encoder's loop over several
)
