"""Engines that serve artifacts, by name: how each is started, on what, and how near it comes.

A new one is a file here with its `Engine`, a worker in `workers/` that runs in the engine's own interpreter, and a row below.
The protocol is in `ask.py`.
"""

from __future__ import annotations

from vlmbuild.engines import llama_cpp, onnxruntime, openvino, transformers, transformers_js, vllm
from vlmbuild.engines.ask import Engine

ENGINES: dict[str, Engine] = {
    "transformers": transformers.ENGINE,
    "onnxruntime": onnxruntime.ENGINE,
    "openvino": openvino.ENGINE,
    "transformers.js": transformers_js.ENGINE,
    "vllm": vllm.ENGINE,
    "llama.cpp": llama_cpp.ENGINE,
}

__all__ = ["ENGINES", "Engine"]
