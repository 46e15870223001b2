"""vLLM: its `LLM` class on the checkpoint, which processes prompts and images itself. It shows tokens and probabilities."""

from __future__ import annotations

from vlmbuild.engines.ask import Engine

ENGINE = Engine(
    name="vllm",
    worker="vllm_worker.py",
    install="{python} -m pip install vllm",
    targets=("compressed-tensors",),
    unquantized=("trainable",),  # it reads no bitsandbytes checkpoints from 0.33 on
    environment=(
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),  # in the worker's process: its errors are the worker's
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
    ),
)
