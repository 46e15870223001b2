"""What a model's state dict holds: every tensor once, and of a model with an adapter only what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from vlmbuild.ir.program import Program


class TrainedState(nn.Module):
    """Checkpoints of trainers stay small, and the tied tensors that safetensors refuses to write stand in them once.

    Both are done where torch comes by on its way through the modules, so that they hold too for a model that is compiled, or
    wrapped for several processes.
    """

    adapter: Any
    program: Program

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_fill_in)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_tie_again)  # type: ignore[no-untyped-call]

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of a full name."""
        path, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.get_submodule(path), leaf)
        return found

    def tie_weights(self) -> None:
        """Give every second name the parameter that it stands for."""
        for alias, name in self.program.ties.items():
            path, _, leaf = alias.rpartition(".")
            module_at(self, path).register_parameter(leaf, self.get_parameter(name))


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path; missing ones on the way are made."""
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    return module


def _leave_out(module: nn.Module, state: MutableMapping[str, Any], prefix: str, _metadata: Any) -> None:
    """Take from a state dict what it need not hold: frozen tensors beside an adapter, and second names."""
    assert isinstance(module, TrainedState)
    for name in _not_held(module, [key.removeprefix(prefix) for key in state if key.startswith(prefix)]):
        del state[f"{prefix}{name}"]


def _not_held(module: TrainedState, names: Iterable[str]) -> list[str]:
    aliases = module.program.ties
    return [name for name in names if name in aliases or not (module.adapter is None or _is_trained(module, name))]


def _is_trained(module: TrainedState, name: str) -> bool:
    """Whether a tensor belongs to the adapter, frozen meanwhile or not."""
    return ".lora_" in name or name in module.adapter.trained


def _fill_in(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Give a state dict that is to be loaded what it need not hold, so that torch misses only what is really missing."""
    assert isinstance(module, TrainedState)
    ties: Mapping[str, str] = module.program.ties
    for name in _not_held(module, _stored_names(module)):
        held = f"{prefix}{ties.get(name, name)}"
        if f"{prefix}{name}" not in state:
            state[f"{prefix}{name}"] = state[held] if held in state else module.tensor(name).detach()


def _stored_names(module: TrainedState) -> list[str]:
    """Of parameters, second names included, and of buffers that are stored."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    for path, owner in module.named_modules():
        stored = owner._buffers.keys() - owner._non_persistent_buffers_set
        names += [f"{path}.{leaf}" if path else leaf for leaf in stored]
    return names


def _tie_again(module: nn.Module, _incompatible: Any) -> None:
    """Loading with `assign=True` puts new parameters in the places of old ones."""
    assert isinstance(module, TrainedState)
    module.tie_weights()
