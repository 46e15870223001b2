"""What trainers of transformers, TRL and accelerate ask of a model besides calling it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vlmbuild.errors import UsageError
from vlmbuild.runtime.checkpointing import Checkpointing


class LossOutput(CausalLMOutputWithPast):
    """Loss now, logits when they are asked for: training needs none, and they are by far the largest tensor."""

    def on_demand(self, logits: Callable[[], Tensor]) -> LossOutput:
        """Make `.logits` by this function, on first access."""
        self.__dict__["_make_logits"] = logits
        return self

    def __getattribute__(self, name: str) -> Any:
        if name == "logits" and (make := super().__getattribute__("__dict__").pop("_make_logits", None)):
            self.logits = make()
        return super().__getattribute__(name)


class TrainerConventions(nn.Module):
    """Names that trainers look up on a model from transformers."""

    accepts_loss_kwargs = True
    checkpointing: Checkpointing | None
    adapter: Any
    config: Any

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = None
        self.warnings_issued: dict[str, bool] = {}
        self.model_tags: list[str] = []

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only the inputs of blocks for backward, and compute the rest again.

        Args:
            activation_checkpointing_kwargs: torch's options; `use_reentrant` must not be true, others are not needed.
            every_n_layers: Checkpoint every so many blocks.
            offload: Keep those inputs in the memory of the host.

        Raises:
            UsageError: Re-entrant checkpointing is asked for: it would lose the gradients of adapters above frozen weights.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise UsageError("use_reentrant=True is not supported; leave it out. Blocks are checkpointed without it.")
        self.checkpointing = Checkpointing(
            options.pop("every_n_layers", every_n_layers), options.pop("offload", offload)
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.checkpointing = None

    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in backward."""
        return self.checkpointing is not None

    def add_model_tags(self, tags: str | Iterable[str]) -> None:
        """Remember what trainers call the model, for model cards."""
        self.model_tags += [tags] if isinstance(tags, str) else list(tags)

    def get_input_embeddings(self) -> nn.Module:
        """The module that holds the table of token embeddings."""
        return self.get_submodule("model.language_model.embed_tokens")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """All parameters and stored buffers; of a model with an adapter only what is trained, since the rest is in the
        artifact. A tied parameter has one name."""
        state = super().state_dict(*args, **kwargs)
        for name in self._left_out(state, str(kwargs.get("prefix", args[1] if len(args) > 1 else ""))):
            del state[name]
        return state

    def _left_out(self, state: Mapping[str, Any], prefix: str) -> list[str]:
        if self.adapter is None:
            return []
        trained = {f"{prefix}{name}" for name, parameter in self.named_parameters() if parameter.requires_grad}
        return [name for name in state if name.startswith(prefix) and name not in trained]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gives. With an adapter, frozen weights may be there or not.

        Raises:
            RuntimeError: `strict`, and a tensor is missing, unknown or of another shape, as torch has it.
        """
        if self.adapter is None:
            return super().load_state_dict(state_dict, strict, assign)
        frozen = {
            name: tensor.detach()
            for name, tensor in nn.Module.state_dict(self).items()
            if name not in state_dict and not getattr(self.get_parameter_or_buffer(name), "requires_grad", False)
        }
        return super().load_state_dict({**frozen, **state_dict}, strict, assign)

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        """The tensor of a full name."""
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.get_submodule(path), leaf)
        return tensor


class Backbone:
    """A model up to its head, as TRL calls `model.base_model`; not a module, so that it holds no parameter twice."""

    def __init__(self, hidden_states: Callable[..., Tensor]) -> None:
        self._hidden_states = hidden_states

    def __call__(self, **batch: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._hidden_states(batch))


def plain_head(model: nn.Module) -> nn.Module:
    """The head as a module with `weight` and `bias`, for losses that multiply by it themselves.

    Raises:
        UsageError: It is quantized or adapted, which such a loss would overlook.
    """
    head = model.get_submodule("lm_head")
    weight = head._parameters.get("weight")
    if weight is None or not torch.is_floating_point(weight) or len(list(head.parameters())) > 1:
        raise UsageError("The head is quantized or has an adapter; a loss that reads its weight would overlook that.")
    if not hasattr(head, "bias"):
        head.register_parameter("bias", None)
    return head
