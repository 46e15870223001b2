"""vlmbuild: compile vision-language models into trainable, verified artifacts.

vlmbuild.build("Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-nf4", vlmbuild.Recipe(quantize=vlmbuild.QuantSpec()))
model, processor = vlmbuild.load("qwen2-vl-nf4")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlmbuild.collector import resting_collector

if TYPE_CHECKING:
    from vlmbuild.adapters import add_lora, load_adapter
    from vlmbuild.artifact.manifest import Manifest
    from vlmbuild.artifact.reader import verify
    from vlmbuild.artifact_cache import from_pretrained
    from vlmbuild.builder import Artifact, build
    from vlmbuild.collator import VisionDataCollator
    from vlmbuild.errors import VlmbuildError
    from vlmbuild.gradient_audit import GradientAudit, audit_gradients
    from vlmbuild.locks.checking import check
    from vlmbuild.locks.document import Lock
    from vlmbuild.locks.sources import diff, lock
    from vlmbuild.memory import Workload
    from vlmbuild.packing import PackedDataset, pack, padding_report
    from vlmbuild.planner import Plan, plan
    from vlmbuild.recipe import QuantSpec, Recipe
    from vlmbuild.runtime.adapter_files import save_adapter
    from vlmbuild.runtime.compiled_model import CompiledVisionLanguageModel
    from vlmbuild.runtime.loader import load
    from vlmbuild.runtime.model import VisionLanguageModel
    from vlmbuild.runtime.onnx_model import OnnxVisionLanguageModel
    from vlmbuild.runtime.sharding import shard
    from vlmbuild.training_callback import TrainingCallback
    from vlmbuild.training_log import TrainingLog
    from vlmbuild.unsloth import FastVisionModel, UnslothVisionDataCollator, is_bf16_supported

_HOMES = {
    "Artifact": "builder",
    "CompiledVisionLanguageModel": "runtime.compiled_model",
    "FastVisionModel": "unsloth",
    "GradientAudit": "gradient_audit",
    "Lock": "locks.document",
    "Manifest": "artifact.manifest",
    "OnnxVisionLanguageModel": "runtime.onnx_model",
    "PackedDataset": "packing",
    "Plan": "planner",
    "QuantSpec": "recipe",
    "Recipe": "recipe",
    "TrainingCallback": "training_callback",
    "TrainingLog": "training_log",
    "UnslothVisionDataCollator": "unsloth",
    "VisionDataCollator": "collator",
    "VisionLanguageModel": "runtime.model",
    "VlmbuildError": "errors",
    "Workload": "memory",
    "add_lora": "adapters",
    "audit_gradients": "gradient_audit",
    "build": "builder",
    "check": "locks.checking",
    "diff": "locks.sources",
    "from_pretrained": "artifact_cache",
    "is_bf16_supported": "unsloth",
    "load": "runtime.loader",
    "load_adapter": "adapters",
    "lock": "locks.sources",
    "pack": "packing",
    "padding_report": "packing",
    "plan": "planner",
    "save_adapter": "runtime.adapter_files",
    "shard": "runtime.sharding",
    "verify": "artifact.reader",
}

__all__ = [
    "Artifact",
    "CompiledVisionLanguageModel",
    "FastVisionModel",
    "GradientAudit",
    "Lock",
    "Manifest",
    "OnnxVisionLanguageModel",
    "PackedDataset",
    "Plan",
    "QuantSpec",
    "Recipe",
    "TrainingCallback",
    "TrainingLog",
    "UnslothVisionDataCollator",
    "VisionDataCollator",
    "VisionLanguageModel",
    "VlmbuildError",
    "Workload",
    "add_lora",
    "audit_gradients",
    "build",
    "check",
    "diff",
    "from_pretrained",
    "is_bf16_supported",
    "load",
    "load_adapter",
    "lock",
    "pack",
    "padding_report",
    "plan",
    "save_adapter",
    "shard",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are asked for: `vlmbuild --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmbuild' has no attribute {name!r}")
    with resting_collector():  # torch and transformers make a million objects that stay
        return getattr(importlib.import_module(f"vlmbuild.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
