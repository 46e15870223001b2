"""Adapters on disk in PEFT's format, written for PEFT and read from it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlmbuild.adapters.identity import Base, write_base
from vlmbuild.adapters.lora import AdapterSpec, Lora, with_patterns
from vlmbuild.adapters.select import ALL_LINEAR
from vlmbuild.artifact.files import closing, open_file, read_file
from vlmbuild.artifact.hub import split_revision
from vlmbuild.errors import OutputError, SourceError, UsageError, reason
from vlmbuild.util.records import read_as
from vlmbuild.util.validation import number

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 64 * 2**20
_UNREADABLE = (
    *(UsageError, OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError),
    *(SafetensorError, re.error),
)
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
)
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
_EMBEDDING_LAYERS = ("embed_tokens.weight", "lm_head.weight")
"""Ends of names that PEFT stores beside LoRA without naming them, where the vocabulary was resized."""
_SLOT = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.default\.weight")
_STORED = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter from a directory.

    Attributes:
        loras: Module name -> rank, scale and dropout.
        tensors: The matrices, by the model's parameter names ("...q_proj.lora_A.default.weight").
        modules: Names of modules that were trained whole, as in the config.
        trained: The parameters of those modules, by the model's names.
        targets: Names, ends of names, or one regular expression of the adapted modules, as in the config.
    """

    loras: Mapping[str, Lora]
    tensors: Mapping[str, Tensor]
    modules: tuple[str, ...]
    trained: Mapping[str, Tensor]
    targets: str | tuple[str, ...] = ALL_LINEAR

    def is_target(self, module: str) -> bool:
        """Return whether PEFT would adapt a module of this name."""
        if isinstance(self.targets, str):
            return self.targets == ALL_LINEAR or re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


def write_adapter(
    directory: str | Path,
    spec: AdapterSpec,
    parameters: Mapping[str, Tensor],
    ties: Mapping[str, str],
    base: str | None,
    model_class: type,
    identity: Base | None = None,
) -> None:
    """Write LoRA matrices and the modules that were trained whole.

    With sharded parameters every process must call it; the first one writes.

    Args:
        directory: Created if missing; an adapter in it is replaced.
        spec: The adapter.
        parameters: The model's parameters by name.
        ties: Tied name -> the parameter that it shares.
        base: `base_model_name_or_path` of the config.
        model_class: transformers' class of the model, which PEFT opens the base with.
        identity: Identity of the base, which loading compares; None if it is not known.

    Raises:
        OutputError: The directory cannot be written.
    """
    tensors = {name: whole(tensor).clone() for name, tensor in _stored_tensors(spec, parameters, ties).items()}
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
        (path / CONFIG_FILE).write_text(json.dumps(_config(spec, base, model_class), indent=2, sort_keys=True) + "\n")
        write_base(path, identity, WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The adapter cannot be written to {path}: {reason(error)}. Choose a directory with space."
        ) from error


def _stored_tensors(spec: AdapterSpec, parameters: Mapping[str, Tensor], ties: Mapping[str, str]) -> dict[str, Tensor]:
    """Return tensors by name in the file. A tied parameter is stored under each of its names, since PEFT unties it."""
    stored: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if match := _SLOT.fullmatch(name):
            stored[f"{_PREFIX}{match['module']}.{match['part']}.weight"] = parameter
    for name in spec.trained:
        for alias in (name, *(alias for alias, owner in ties.items() if owner == name)):
            stored[f"{_PREFIX}{alias}"] = parameters[name]
    return stored


def _config(adapter: AdapterSpec, base: str | None, model_class: type) -> dict[str, Any]:
    """Return the adapter's config for PEFT, with the most frequent rank and alpha, and patterns for others."""
    name, revision = (None, None) if base is None else split_revision(base)
    kinds = Counter(adapter.loras.values())
    common = kinds.most_common(1)[0][0] if kinds else Lora(1, 1.0)
    return {
        "peft_type": "LORA",
        # PEFT's classes of tasks open text models alone: without a task AutoPeftModel takes the class that is named here.
        "task_type": None,
        "auto_mapping": {"base_model_class": model_class.__name__, "parent_library": model_class.__module__},
        "base_model_name_or_path": name,
        **({} if revision is None else {"revision": revision}),
        "r": common.r,
        "lora_alpha": common.alpha,
        "lora_dropout": common.dropout,
        "use_rslora": common.rslora,
        "rank_pattern": {name: lora.r for name, lora in adapter.loras.items() if lora.r != common.r},
        "alpha_pattern": {name: lora.alpha for name, lora in adapter.loras.items() if lora.alpha != common.alpha},
        "bias": "none",
        "target_modules": sorted(adapter.loras),
        "modules_to_save": sorted(adapter.modules) or None,
        "inference_mode": True,
    }


def read_adapter(directory: str | Path) -> Adapter:
    """Read the adapter in a directory, in PEFT's format.

    Raises:
        SourceError: A file is missing or malformed, or the adapter is not LoRA with modules trained whole.
    """
    path = Path(directory)
    try:
        config = json.loads(read_file(path / CONFIG_FILE, _MAX_CONFIG_BYTES))
        with closing(open_file(path / WEIGHTS_FILE)):  # refused here if it is a pipe, which the library would wait for
            stored = load_file(path / WEIGHTS_FILE)
        _check_config(config, path)
        lora = Lora(
            config["r"],
            number(config["lora_alpha"], "lora_alpha"),
            number(config.get("lora_dropout") or 0, "lora_dropout"),
            read_as(bool, config.get("use_rslora") or False, "use_rslora"),
        )
        ranks, alphas = (dict(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern"))
        modules, targets = tuple(config.get("modules_to_save") or ()), config["target_modules"]
        targets = targets if isinstance(targets, str) else read_as(tuple[str, ...], targets, "target_modules")
        re.compile(targets if isinstance(targets, str) else "")
        return replace(_adapter(stored, lora, ranks, alphas, modules, path), targets=targets)
    except _UNREADABLE as error:
        raise SourceError(
            f"{path} is not a readable adapter ({type(error).__name__}: {reason(error)}). It must hold {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} as PEFT writes them."
        ) from error


def _adapter(
    stored: Mapping[str, Tensor],
    lora: Lora,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    modules: tuple[str, ...],
    path: Path,
) -> Adapter:
    loras, tensors, trained = {}, {}, {}
    for key, tensor in stored.items():
        name = key.removeprefix(_PREFIX)
        if match := _STORED.fullmatch(name):
            module = match["module"]
            loras[module] = with_patterns(lora, module, ranks, alphas)
            tensors[f"{module}.{match['part']}.default.weight"] = tensor
        elif name.endswith(_EMBEDDING_LAYERS) and not any(f".{module}." in f".{name}" for module in modules):
            modules += (name.removesuffix(".weight"),)
            trained[name] = tensor
        elif ".lora_" in name or not any(f".{module}." in f".{name}" for module in modules):
            raise SourceError(
                f"{path}: {name} is neither a plain LoRA matrix nor part of a module in modules_to_save. Save it again with "
                "PEFT."
            )
        else:
            trained[name] = tensor
    if not stored:
        raise SourceError(f"{path} holds no tensors. Save the adapter again.")
    return Adapter(loras, tensors, modules, trained)


def _check_config(config: Any, path: Path) -> None:
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        unsupported.append(f"init_lora_weights={config['init_lora_weights']!r}")  # it changes the base weights
    if config["peft_type"] != "LORA" or unsupported:
        kind = f"{config['peft_type']}{' with ' + ', '.join(unsupported) if unsupported else ''}"
        raise SourceError(f"{path}: only plain LoRA adapters can be loaded, not {kind}. Merge it with PEFT first.")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor detached, contiguous and on the CPU; gathered from all processes if it is sharded."""
    detached: Any = tensor.detach()
    if isinstance(detached, DTensor):
        detached = detached.full_tensor()
    plain: torch.Tensor = detached.cpu().contiguous()
    return plain
