"""State dicts: every tensor once, and only trained tensors of a model with an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from vlmbuild.ir.program import Program


class TrainedState(nn.Module):
    """A module whose checkpoints stay small and hold tied tensors once, since safetensors refuses to write them twice.

    Hooks that torch calls on its way through the modules do both, so that they hold for compiled and wrapped models too.
    """

    adapter: Any
    program: Program

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_fill_in)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_tie_again)  # type: ignore[no-untyped-call]

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer by its full name."""
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.get_submodule(path), leaf)
        return tensor

    def tie_weights(self) -> None:
        """Register every tied parameter under its second name."""
        for alias, name in self.program.ties.items():
            path, _, leaf = alias.rpartition(".")
            module_at(self, path).register_parameter(leaf, self.get_parameter(name))


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path; create missing ones on the way."""
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    return module


def _leave_out(module: nn.Module, state: MutableMapping[str, Any], prefix: str, _metadata: Any) -> None:
    """Remove frozen tensors beside an adapter, and second names, from a state dict."""
    assert isinstance(module, TrainedState)
    for name in _left_out(module, [key.removeprefix(prefix) for key in state if key.startswith(prefix)]):
        del state[f"{prefix}{name}"]


def _left_out(module: TrainedState, names: Iterable[str]) -> list[str]:
    aliases = module.program.ties
    return [name for name in names if name in aliases or not (module.adapter is None or _is_trained(module, name))]


def _is_trained(module: TrainedState, name: str) -> bool:
    """Return whether a tensor belongs to the adapter, frozen or not."""
    return ".lora_" in name or name in module.adapter.trained


def _fill_in(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Complete a state dict before loading, so that torch reports only tensors that are really missing."""
    assert isinstance(module, TrainedState)
    ties: Mapping[str, str] = module.program.ties
    for name in _left_out(module, _stored_names(module)):
        source = f"{prefix}{ties.get(name, name)}"
        if f"{prefix}{name}" not in state:
            state[f"{prefix}{name}"] = state[source] if source in state else module.tensor(name).detach()


def _stored_names(module: TrainedState) -> list[str]:
    """Return names of parameters, second names included, and of stored buffers."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    for path, owner in module.named_modules():
        stored = owner._buffers.keys() - owner._non_persistent_buffers_set
        names += [f"{path}.{leaf}" if path else leaf for leaf in stored]
    return names


def _tie_again(module: nn.Module, _incompatible: Any) -> None:
    """Restore ties, since loading with `assign=True` replaces parameters."""
    assert isinstance(module, TrainedState)
    module.tie_weights()
