"""transformers.js in Node: `NODE_PATH` names the node_modules folder that has it."""

from __future__ import annotations

from vlmbuild.engines.ask import Engine
from vlmbuild.golden.tolerances import OTHER_FILTER

ENGINE = Engine(
    name="transformers.js",
    worker="transformers_js_worker.mjs",
    install="npm install @huggingface/transformers && export NODE_PATH=$PWD/node_modules",
    targets=("onnx",),
    pixels=OTHER_FILTER,  # its images are resized by sharp
    program="node",
    one_image=True,  # several become frames of one video
)
