"""llama.cpp, through llama-cpp-python: its tokenizer, its image processor, its tower and its language model."""

from __future__ import annotations

from vlmbuild.engines.ask import Engine

ENGINE = Engine(
    name="llama.cpp",
    worker="llama_cpp_worker.py",
    install="{python} -m pip install llama-cpp-python pillow",
    targets=("gguf",),
)
