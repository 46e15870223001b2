"""The modules of a model's tree: names that hold parameters, and called modules, where hooks run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlmbuild.errors import UsageError

EMBEDDINGS, HEAD = "embed_tokens", "lm_head"
"""Last parts of the paths of the table of embeddings and of the head."""
_ADVICE = "For LoRA call vlmbuild.add_lora(model), not PEFT"


def _only_torchs(register: Callable[..., Any]) -> Any:
    """Refuse hooks that would never run; torch's sharding registers its own, and gathers what it shards itself."""

    def checked(module: nn.Module, hook: Any, **options: Any) -> Any:
        if _is_torchs(hook):
            return register(module, hook, **options)
        held = ", ".join([*module._parameters, *module._buffers, *module._modules][:4])
        raise UsageError(
            f"A hook on the module that holds {held} would never run: a graph reads its parameters, and nothing calls it. "
            'Register it on the whole model, on a block (model.get_submodule("model.language_model.layers.0")), on '
            "model.get_input_embeddings() or on model.get_output_embeddings()."
        )

    return checked


def _is_torchs(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


class NamedModule(nn.Module):
    """A name in transformers' tree that holds parameters for graphs, and is never called: its hooks are refused."""

    register_forward_hook: Any = _only_torchs(nn.Module.register_forward_hook)
    register_forward_pre_hook: Any = _only_torchs(nn.Module.register_forward_pre_hook)
    register_full_backward_hook: Any = _only_torchs(nn.Module.register_full_backward_hook)
    register_full_backward_pre_hook: Any = _only_torchs(nn.Module.register_full_backward_pre_hook)

    def extra_repr(self) -> str:
        names = [*self._parameters, *self._buffers]
        return f"{', '.join(names)} of a graph. {_ADVICE}" if names else ""


class CalledModule(NamedModule):
    """A module that is called, as transformers calls it, while somebody has registered a hook on it."""

    register_forward_hook: Any = nn.Module.register_forward_hook
    register_forward_pre_hook: Any = nn.Module.register_forward_pre_hook
    register_full_backward_hook: Any = nn.Module.register_full_backward_hook
    register_full_backward_pre_hook: Any = nn.Module.register_full_backward_pre_hook

    @property
    def has_hooks(self) -> bool:
        """True if calling it differs from what its graph computes."""
        hooks = [*self._forward_hooks.values(), *self._forward_pre_hooks.values()]
        return bool(self._backward_hooks or self._backward_pre_hooks) or not all(map(_is_torchs, hooks))


class Embeddings(CalledModule):
    """The table of token embeddings."""

    weight: Tensor

    def forward(self, ids: Tensor, *, padding_idx: int = -1) -> Tensor:
        """Look up (batch, sequence) ids: (batch, sequence, hidden)."""
        return F.embedding(ids, self.weight, padding_idx if padding_idx >= 0 else None)


class Head(CalledModule):
    """The head: `weight` (vocabulary, hidden) and `bias`."""

    def forward(self, hidden: Tensor, *, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute logits (batch, sequence, vocabulary) by `run`, which has the head's graph."""
        return run(hidden)


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path; create missing ones on the way."""
    module, name = root, ""
    for part in path.split(".") if path else ():
        name = f"{name}.{part}" if name else part
        if part not in module._modules:
            kind = {EMBEDDINGS: Embeddings, HEAD: Head}.get(part, NamedModule)
            module.add_module(part, kind())
        module = module._modules[part]  # type: ignore[assignment]
    return module


def tensor_at(root: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its full name."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(path), leaf)
    return tensor
