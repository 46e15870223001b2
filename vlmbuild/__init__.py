"""vlmbuild: compile vision-language models into trainable, verified artifacts.

vlmbuild.build("Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-nf4", vlmbuild.Recipe(quantize=vlmbuild.QuantSpec()))
model, processor = vlmbuild.load("qwen2-vl-nf4")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlmbuild.util.gc_paused import gc_paused

if TYPE_CHECKING:
    from vlmbuild.artifact.manifest import Manifest
    from vlmbuild.artifact.reader import verify
    from vlmbuild.builder.build import Artifact, build
    from vlmbuild.builder.cache import from_pretrained
    from vlmbuild.compat.unsloth import FastVisionModel, UnslothVisionDataCollator, is_bf16_supported
    from vlmbuild.errors import VlmbuildError
    from vlmbuild.locks.check import check
    from vlmbuild.locks.document import Lock
    from vlmbuild.locks.sources import diff, lock
    from vlmbuild.planner.memory import Workload
    from vlmbuild.planner.plan import Plan, plan
    from vlmbuild.recipe import QuantSpec, Recipe
    from vlmbuild.runtime.aoti.model import CompiledVisionLanguageModel
    from vlmbuild.runtime.load import load
    from vlmbuild.runtime.onnx.model import OnnxVisionLanguageModel
    from vlmbuild.runtime.torch.model import VisionLanguageModel
    from vlmbuild.runtime.torch.sharding import shard
    from vlmbuild.train.audit import GradientAudit, audit_gradients
    from vlmbuild.train.callback import TrainingCallback
    from vlmbuild.train.collator import VisionDataCollator
    from vlmbuild.train.lora import add_lora, load_adapter, save_adapter
    from vlmbuild.train.packing import PackedDataset, pack, padding_report

_HOMES = {
    "Artifact": "builder.build",
    "CompiledVisionLanguageModel": "runtime.aoti.model",
    "FastVisionModel": "compat.unsloth",
    "GradientAudit": "train.audit",
    "Lock": "locks.document",
    "Manifest": "artifact.manifest",
    "OnnxVisionLanguageModel": "runtime.onnx.model",
    "PackedDataset": "train.packing",
    "Plan": "planner.plan",
    "QuantSpec": "recipe",
    "Recipe": "recipe",
    "TrainingCallback": "train.callback",
    "UnslothVisionDataCollator": "compat.unsloth",
    "VisionDataCollator": "train.collator",
    "VisionLanguageModel": "runtime.torch.model",
    "VlmbuildError": "errors",
    "Workload": "planner.memory",
    "add_lora": "train.lora",
    "audit_gradients": "train.audit",
    "build": "builder.build",
    "check": "locks.check",
    "diff": "locks.sources",
    "from_pretrained": "builder.cache",
    "is_bf16_supported": "compat.unsloth",
    "load": "runtime.load",
    "load_adapter": "train.lora",
    "lock": "locks.sources",
    "pack": "train.packing",
    "padding_report": "train.packing",
    "plan": "planner.plan",
    "save_adapter": "train.lora",
    "shard": "runtime.torch.sharding",
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
    """Import public names on first use: `vlmbuild --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmbuild' has no attribute {name!r}")
    with gc_paused():  # torch and transformers make a million objects that stay
        return getattr(importlib.import_module(f"vlmbuild.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
