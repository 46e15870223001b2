"""What trainers of transformers, TRL and accelerate ask of a model besides calling it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vlmbuild.errors import UsageError
from vlmbuild.runtime.torch.checkpointing import Checkpointing
from vlmbuild.runtime.torch.state import TrainedState

_TORCH_OPTIONS = {"preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"}
"""Of `torch.utils.checkpoint.checkpoint`."""


class LossOutput(CausalLMOutputWithPast):
    """Loss now, logits when they are asked for: training needs none, and they are by far the largest tensor.

    A wrapper that makes an output of its own (accelerate's mixed precision, FSDP) leaves them out: `.logits` is None there.
    """

    def on_demand(self, logits: Callable[[], Tensor]) -> LossOutput:
        """Make `.logits` by this function, on first access."""
        self.__dict__["_make_logits"] = logits
        return self

    def __getitem__(self, key: Any) -> Any:
        return self.logits if key == "logits" else super().__getitem__(key)  # type: ignore[no-untyped-call]

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dict."""
        return self.logits if key == "logits" else super().get(key, default)

    def __getattribute__(self, name: str) -> Any:
        if name == "logits" and (make := super().__getattribute__("__dict__").pop("_make_logits", None)):
            self.logits = make()
        return super().__getattribute__(name)


class TrainerConventions(TrainedState):
    """Names that trainers look up on a model from transformers."""

    accepts_loss_kwargs = True
    _no_split_modules = ("RegionInstance",)
    """What accelerate shards as one unit, with FSDP's policy for transformers."""
    checkpointing: Checkpointing | None
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
            activation_checkpointing_kwargs: `every_n_layers` and `offload`, as trainers hand them on, and torch's options, of
                which `use_reentrant` must not be true and the others are not needed.
            every_n_layers: Checkpoint every so many blocks.
            offload: Keep those inputs in the memory of the host.

        Raises:
            UsageError: An option is unknown, or re-entrant checkpointing is asked for: it would lose the gradients of
                adapters above frozen weights.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise UsageError("use_reentrant=True is not supported; leave it out. Blocks are checkpointed without it.")
        every, moved = options.pop("every_n_layers", every_n_layers), options.pop("offload", offload)
        if unknown := sorted(options.keys() - _TORCH_OPTIONS):
            raise UsageError(f"Gradient checkpointing has no option {unknown[0]!r}; it has every_n_layers and offload.")
        self.checkpointing = Checkpointing(every, moved)

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


class Backbone:
    """A model up to its head, for losses that multiply by the head's weight themselves (TRL's trainers); not a module, so
    that it holds no parameter twice.

    Raises:
        UsageError: When called: the head is quantized or adapted, which such a loss would overlook.
    """

    def __init__(self, hidden_states: Callable[..., Tensor], head: nn.Module) -> None:
        self._hidden_states = hidden_states
        self._head = head

    def __call__(self, **batch: Any) -> BaseModelOutputWithPast:
        weight: Any = self._head.weight
        if not weight.is_floating_point() or "lora_A" in self._head._modules:
            raise UsageError(
                "The head is quantized or has an adapter, and this trainer's loss would overlook that. Use "
                "transformers.Trainer, or leave the head as it is: build without quantizing it, and add_lora without lm_head "
                "in `target`."
            )
        return BaseModelOutputWithPast(last_hidden_state=self._hidden_states(batch))


def head_module(model: nn.Module) -> nn.Module:
    """The head as a module with `weight` and `bias`."""
    head = model.get_submodule("lm_head")
    if not hasattr(head, "bias"):
        head.register_parameter("bias", None)
    return head
