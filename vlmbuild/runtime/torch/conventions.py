"""Public methods of transformers' models that trainers of transformers, TRL and accelerate call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlmbuild.adapters.identity import Base
from vlmbuild.adapters.peft_files import write_adapter
from vlmbuild.errors import UsageError
from vlmbuild.runtime.hf import BaseModelOutputWithPast
from vlmbuild.runtime.torch.checkpointing import Checkpointing
from vlmbuild.runtime.torch.modules import EMBEDDINGS, Embeddings
from vlmbuild.runtime.torch.program_model import ProgramModel
from vlmbuild.runtime.torch.save import link_weights, write_checkpoint
from vlmbuild.runtime.torch.vocabulary import resize_vocabulary

_TORCH_OPTIONS = {"preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"}
"""Options of `torch.utils.checkpoint.checkpoint`."""

_REFERENCE_TAGS = {"dpo", "grpo", "kto", "rloo"}
"""Tags of TRL's trainers that compare with a reference model."""


class TrainerConventions(ProgramModel):
    """Gradient checkpointing, saving and counting under transformers' and PEFT's names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.source: str | None = None
        """Source as its user named it (path, hub id or zoo name), which saved adapters name as their base."""
        self.identity: Base | None = None
        """Identity of the weights and the processor, which saved adapters name; None for weights of no artifact."""
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
                `use_reentrant` must not be true, the others are ignored with a warning.
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
        if options:
            warnings.warn(
                f"Gradient checkpointing ignores {', '.join(sorted(options))}. Leave them out; every_n_layers and offload "
                "choose what is kept.",
                stacklevel=2,
            )
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

    is_activation_checkpointing = is_gradient_checkpointing

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "50GB",
    ) -> None:
        """Write what was trained: an adapter in PEFT's format, or else a checkpoint that transformers and vlmbuild open.

        Args:
            save_directory: Created if missing.
            is_main_process: Passed by trainers, whose checkpoints hold `model.safetensors` too: another name of the adapter's
                file, for resuming. False writes nothing.
            state_dict: The tensors, where they were gathered from several processes.
            max_shard_size: Most bytes of a file of a checkpoint.

        Raises:
            UsageError: It is the directory of the model's own artifact, or the model has none.
            OutputError: The directory cannot be written.
        """
        directory = Path(save_directory)
        if self.path is not None and directory.resolve() == self.path.resolve():
            raise UsageError(f"{directory} holds the artifact that this model reads. Save into another directory.")
        if is_main_process is False:
            return
        tensors = dict(self.named_parameters()) if state_dict is None else state_dict
        if self.adapter is None:
            write_checkpoint(self, directory, tensors, max_shard_size)
            return
        ties, model_class = self.program.ties, self.family.model_class
        write_adapter(directory, self.adapter, tensors, ties, self.source, model_class, self.identity)
        if is_main_process:
            link_weights(directory)

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

    def resize_token_embeddings(  # type: ignore[override]
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Embeddings:
        """Add rows at the end of the embeddings and the head for new tokens, or drop rows there, as transformers does.

        A tokenizer may have fewer tokens than the model has rows: its new tokens then have rows already. Whatever is trained
        and saved afterwards has the new rows. An adapter stores them if both tables are trained whole, as `add_lora` demands:
        `modules_to_save=["embed_tokens", "lm_head"]`.

        Args:
            new_num_tokens: Rows, `len(processor.tokenizer)`; None keeps their number.
            pad_to_multiple_of: Round the number up to a multiple.
            mean_resizing: Draw new rows around the mean of the old ones, with 1e-9 of their covariance; else from a normal
                distribution with the config's `initializer_range`. The drawn values are transformers' for the same seed.

        Returns:
            The module of the embeddings.

        Raises:
            UsageError: The model has an adapter, a table is quantized or sharded, or a token that the config names would have
                no row.
        """
        resize_vocabulary(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
        return self.get_input_embeddings()

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags for the hub, and warn of a trainer's reference that differs from PEFT's.

        TRL's trainers add theirs once they have made the reference. For an adapter that has been trained already they copy it
        in a `PeftModel`, and load the artifact by its name for other models.
        """
        super().add_model_tags(tags)
        if not _REFERENCE_TAGS.isdisjoint([tags] if isinstance(tags, str) else tags) and any(
            bool(parameter.any()) for name, parameter in self.named_parameters() if ".lora_B." in name
        ):
            warnings.warn(
                "The adapter has been trained before. A reference that this trainer loads by itself (no ref_model, beta above "
                "0) is the artifact without it, while PEFT would copy the adapter. To compare with the adapter as it is now, "
                "merge it with vlmbuild build ARTIFACT --adapter DIRECTORY -o OUTPUT, and train a new one on OUTPUT.",
                stacklevel=2,
            )

    # Counting, as in PEFT ----------------------------------------------------------------------------------------------

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters, quantized ones by their shape before quantization."""
        trainable = {name for name, _ in self.trainable_parameters()}
        return sum(
            math.prod(weight.shape)
            for weight in self.program.source_weights()
            if (weight.name in trainable or not only_trainable)
            and not (exclude_embeddings and weight.name.endswith(f".{EMBEDDINGS}.weight"))
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of trainable parameters and of all."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print these numbers as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )


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
