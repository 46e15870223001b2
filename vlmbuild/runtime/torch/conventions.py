"""Public methods of transformers' models that trainers of transformers, TRL and accelerate call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlmbuild.adapters.lora import AdapterSpec
from vlmbuild.adapters.peft_files import write_adapter
from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.runtime.hf import BaseModelOutputWithPast, TrainerHooks
from vlmbuild.runtime.torch.checkpointing import Checkpointing
from vlmbuild.runtime.torch.state import TrainedState

_TORCH_OPTIONS = {"preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"}
"""Options of `torch.utils.checkpoint.checkpoint`."""


class TrainerConventions(TrainerHooks, TrainedState):
    """Gradient checkpointing, saving and embeddings under transformers' names."""

    config: Any
    family: Family

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing: Checkpointing | None = None
        self.adapter: AdapterSpec | None = None
        self.source: str | None = None
        """Artifact as its user named it: a path or hub id."""
        self.merged_writer: Callable[..., None] | None = None
        """Implementation of `save_pretrained_merged`; it needs the builder, which a loaded model does without."""

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only the inputs of blocks for backward, and recompute the rest.

        Args:
            activation_checkpointing_kwargs: `every_n_layers` and `offload`, as trainers pass them on, and torch's options:
                `use_reentrant` must not be true, the others have no effect.
            every_n_layers: Checkpoint every n-th block.
            offload: Keep these inputs in host memory.

        Raises:
            UsageError: An option is unknown, or checkpointing would be re-entrant, which loses the gradients of adapters above
                frozen weights.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise UsageError("use_reentrant=True is not supported; leave it out. Blocks are checkpointed without it.")
        every, offload = options.pop("every_n_layers", every_n_layers), options.pop("offload", offload)
        if unknown := sorted(options.keys() - _TORCH_OPTIONS):
            raise UsageError(f"Gradient checkpointing has no option {unknown[0]!r}; it has every_n_layers and offload.")
        self.checkpointing = Checkpointing(every, offload)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Call `activation_checkpointing_enable`, which has this older name too."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.checkpointing = None

    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """True if blocks are recomputed in backward."""
        return self.checkpointing is not None

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that holds the table of token embeddings."""
        return self.get_submodule("model.language_model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        """Return the head: `weight` (vocabulary, hidden) and `bias`."""
        head = self.get_submodule("lm_head")
        if not hasattr(head, "bias"):
            head.register_parameter("bias", None)
        return head

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the adapter, in PEFT's format, as `vlmbuild.save_adapter` does; the weights below it are the artifact's.

        Raises:
            UsageError: The model has no adapter.
            OutputError: The directory cannot be written.
        """
        if self.adapter is None:
            raise UsageError("The model has no adapter to save. Call vlmbuild.add_lora(model, r=16) first.")
        write_adapter(
            save_directory,
            self.adapter,
            dict(self.named_parameters()),
            self.program.ties,
            self.source,
            self.family.model_class,
        )

    def save_pretrained_merged(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """Write an artifact with the adapter merged, by the function that `FastVisionModel` has set.

        Raises:
            UsageError: The model was loaded in another way.
        """
        if self.merged_writer is None:
            raise UsageError(
                "save_pretrained_merged belongs to models from FastVisionModel. Save the adapter, and merge it with "
                "vlmbuild build ARTIFACT --adapter DIRECTORY -o OUTPUT."
            )
        self.merged_writer(self, save_directory, *arguments, **options)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of all parameters that take a gradient."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)


class Backbone:
    """The model without its head, for losses that multiply by the head's weight themselves (TRL's trainers).

    It is no module, so that no parameter is held twice.
    """

    def __init__(self, hidden_states: Callable[..., Tensor], head: nn.Module) -> None:
        self._hidden_states = hidden_states
        self._head = head

    def __call__(self, **batch: Any) -> BaseModelOutputWithPast:
        """Return `.last_hidden_state` (batch, sequence, hidden).

        Raises:
            UsageError: The head is quantized or has an adapter, which such a loss would overlook.
        """
        weight: Any = self._head.weight
        if not weight.is_floating_point() or "lora_A" in self._head._modules:
            raise UsageError(
                "The head is quantized or has an adapter, and this trainer's loss would overlook that. Use "
                "transformers.Trainer, or leave the head as it is: build without quantizing it, and add_lora without lm_head "
                "in `target`."
            )
        return BaseModelOutputWithPast(last_hidden_state=self._hidden_states(batch))
