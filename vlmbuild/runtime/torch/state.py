"""State dicts: every tensor once, and only trained tensors of a model with an adapter.

Checkpoints stay small, and hold tied tensors once, since safetensors refuses to write them twice. Hooks that torch calls on
its way through the modules do both, so that they hold for compiled and wrapped models too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import nn

from vlmbuild.errors import UsageError
from vlmbuild.ir.program import join
from vlmbuild.runtime.torch.modules import tensor_at

Stateful = Any
"""A module with `program` and `adapter`: `vlmbuild.runtime.torch.program_model.ProgramModel`, which imports this module."""


def add_state_hooks(model: nn.Module) -> None:
    """Let the state dicts of a model have every tensor once, and load such ones."""
    model.register_state_dict_post_hook(_leave_out)
    model.register_load_state_dict_pre_hook(_fill_in)
    model.register_load_state_dict_post_hook(_tie_again)


def _leave_out(module: Stateful, state: MutableMapping[str, Any], prefix: str, _metadata: Any) -> None:
    """Remove frozen tensors beside an adapter, and second names, from a state dict."""
    for name in _left_out(module, [key.removeprefix(prefix) for key in state if key.startswith(prefix)]):
        del state[f"{prefix}{name}"]


def _left_out(module: Stateful, names: Iterable[str]) -> list[str]:
    trained = None if module.adapter is None else module.adapter.trained
    return [
        name
        for name in names
        if name in module.program.ties or not (trained is None or ".lora_" in name or name in trained)
    ]


def _fill_in(module: Stateful, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Complete a state dict before loading, so that torch reports only tensors that are really missing.

    Raises:
        UsageError: It has an adapter of other layers than the model.
    """
    _rename(module, state, prefix)
    _check_adapter(module, {key.removeprefix(prefix) for key in state if key.startswith(prefix)})
    ties: Mapping[str, str] = module.program.ties
    for name in _left_out(module, _stored_names(module)):
        source = f"{prefix}{ties.get(name, name)}"
        if f"{prefix}{name}" not in state:
            state[f"{prefix}{name}"] = state[source] if source in state else tensor_at(module, name).detach()


def _rename(module: Stateful, state: MutableMapping[str, Any], prefix: str) -> None:
    """Rename the tensors of a file that `save_pretrained` wrote, by PEFT's names or by published ones, to the model's."""
    known = set(_stored_names(module))
    quantized = tuple(
        module.family.stored_name(join(instance, recipe.source))
        for region in module.program.regions.values()
        for recipe in region.recipes
        for instance in region.instances
    )
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        plain = re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name.removeprefix("base_model.model."))
        renamed = next((n for n in (name, plain, module.family.module_name(plain)) if n in known), None)
        if renamed is None and name.startswith(quantized):
            del state[key]  # frozen, and the model's own
        elif renamed not in (None, name):
            state[f"{prefix}{renamed}"] = state.pop(key)


def _check_adapter(module: Stateful, names: set[str]) -> None:
    """Refuse an adapter of other layers, of which trainers would load a part."""
    found = {name for name in names if ".lora_" in name}
    expected = {name for name in _stored_names(module) if ".lora_" in name}
    if found and (different := sorted(found ^ expected)):
        where = "the model" if different[0] in found else "the checkpoint"
        raise UsageError(
            f"The checkpoint has an adapter of other layers: {len(different)} of its tensors differ, and {where} lacks "
            f"{different[0]}. Call add_lora with the options of the run that wrote it, or start without "
            "resume_from_checkpoint."
        )


def _stored_names(module: nn.Module) -> list[str]:
    """Return names of parameters, second names included, and of stored buffers."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    for path, owner in module.named_modules():
        stored = owner._buffers.keys() - owner._non_persistent_buffers_set
        names += [f"{path}.{leaf}" if path else leaf for leaf in stored]
    return names


def _tie_again(module: Stateful, _incompatible: Any) -> None:
    """Restore ties, since loading with `assign=True` replaces parameters."""
    module.tie_weights()
