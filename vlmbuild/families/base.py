"""What a model family tells the builder: the one place where a family's name and habits may appear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vlmbuild.errors import SourceError
from vlmbuild.families.js import ClientFiles, ClientVision
from vlmbuild.ir.program import Geometry, Input, Role

InputLayout = Literal["sample", "token", "medium"]
"""What the rows of a batch's tensor are: samples; samples with an entry for every token, which generation repeats for the
tokens that it adds; or the images and videos of all samples in one list."""

IGNORED_CONFIG_KEYS = ("auto_map", "trust_remote_code", "_attn_implementation", "attn_implementation")
STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch after the host prologue, packed: the tokens of all samples in one row, without padding.

    Attributes:
        variant: Which variant of the program runs it.
        tensors: That variant's inputs.
        index: Where each packed token stood in the flattened (batch, sequence) input ids.
    """

    variant: str
    tensors: dict[str, Tensor]
    index: Tensor


class ImageCost(NamedTuple):
    """What an image costs: rows of the vision tower (padding included), tokens in the sequence, keys for cross-attention."""

    patches: int
    tokens: int
    cross_keys: int = 0


class KeyGroups(NamedTuple):
    """What a query of an attention layer sees, by groups of keys; a core module hands it to transformers as the attention
    mask, and capture to the operator.

    Attributes:
        key_groups: int32 (keys,), the group of every key.
        visible_groups: bool (queries, groups).
    """

    key_groups: Tensor
    visible_groups: Tensor


class Family(Protocol):
    """A family of models with one config class, one prologue and one set of names."""

    @property
    def name(self) -> str:
        """Key in `FAMILIES`, and the family's name in stored programs."""

    @property
    def title(self) -> str:
        """What people call it."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """Values of `architectures` in config.json that this family reads."""

    @property
    def input_layout(self) -> Mapping[str, InputLayout]:
        """What else the processor's output has besides input_ids and attention_mask."""

    @property
    def processors(self) -> tuple[str, ...]:
        """Names of the classes of this family's processors."""

    @property
    def resizable_keys(self) -> tuple[str, ...]:
        """Keys of the image processor's `size` that may be set lower without another model."""

    @property
    def pads_image_batch(self) -> bool:
        """Whether a batch gives every sample as many images as the one with most, and the model computes them."""

    def media_tokens(self, processor: Any) -> frozenset[int]:
        """Ids of the tokens that stand for images and videos, or begin, divide and end them; a model never writes them."""

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        """Tokens that take the place of the placeholder of an image of this size (in pixels, before it is resized).

        Raises:
            ValueError: The processor refuses it.
        """

    def config(self, values: Mapping[str, Any]) -> Any:
        """The transformers config object for the values of a config.json; runs no code that the values name.

        Raises:
            SourceError: A value has the wrong type or contradicts another.
        """

    def geometry(self, config: Any) -> Geometry:
        """What passes may know."""

    def variants(self, config: Any) -> dict[str, tuple[Input, ...]]:
        """The inputs of every variant."""

    def module(self, config: Any, variant: str, attention: str) -> nn.Module:
        """The module to trace, on the meta device, in `COMPUTE_DTYPE`, with parameters named as transformers names them.

        Args:
            config: From `config`.
            variant: A key of `variants`; the module takes its inputs as keyword arguments and returns logits.
            attention: Name of the attention implementation registered with transformers.
        """

    def ties(self, config: Any) -> dict[str, str]:
        """Alias -> parameter for tensors that share storage."""

    def constants(self, config: Any) -> dict[str, Tensor]:
        """Tensors that follow from the config (rotary frequencies), by module name."""

    def role(self, name: str) -> Role:
        """What a parameter of this (module) name does."""

    def stored_name(self, name: str) -> str:
        """Module name -> name in published checkpoint files."""

    def module_name(self, stored: str) -> str:
        """Name in a checkpoint file, published or as newer versions write it -> module name."""

    def prepare(self, batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
        """The host prologue: everything that depends on data, as tensors, and the checks that name a bad sample.

        Args:
            batch: The processor's output, and `labels` if there are any.
            config: From `config`.
            processor: The artifact's; its pixel limits must be those that the batch was made with.

        Raises:
            BatchError: The batch contradicts itself, or training on it would be silently wrong.
        """

    @property
    def extra_embedding_rows(self) -> int:
        """How many rows the table of embeddings has beyond the vocabulary."""

    def client_vision(self, config: Any) -> ClientVision | None:
        """The vision prologue as a graph, from what clients pass; None where no client knows the family."""

    def client_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The inputs of `client_vision` from a processor's output; None where there is none."""

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        """The JSON files of a checkpoint as clients read them.

        Args:
            values: Of config.json.
            files: Of the tokenizer and the processors.
            template: The chat template.
        """

    def processor(self, directory: Path) -> Any:
        """The processor of a checkpoint or artifact directory; works without torchvision.

        Raises:
            SourceError: A processor file is missing or unreadable.
        """

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        """What an image of this size, before it is resized, costs.

        Args:
            image_processor: transformers' own, of the checkpoint; its `size` has the limits.
            config: From `config`.
            height, width: In pixels.

        Raises:
            ValueError: The processor refuses it.
        """

    def batch_sizes(self, config: Any, images: Sequence[ImageCost], batch: int, text_tokens: int) -> dict[str, int]:
        """The sizes that the inputs of a variant name, for a batch of equal samples.

        Args:
            config: From `config`.
            images: Of each sample; without any it is the variant "text".
            batch: Samples.
            text_tokens: Of each sample, besides the tokens of its images.
        """


def read_config(values: Mapping[str, Any], config_class: Any, check: Callable[[Any], None], what: str) -> Any:
    """A transformers config from plain values, checked; keys that name code are left out.

    Raises:
        SourceError: A value has the wrong type, contradicts another, or `check` refuses it.
    """
    plain = {key: value for key, value in values.items() if key not in IGNORED_CONFIG_KEYS}
    try:
        config = config_class.from_dict(plain)
        check(config)
    except SourceError:
        raise
    except Exception as error:  # transformers validates with many exception types
        raise SourceError(f"config.json is not a valid {what} config: {error}") from error
    return config


def check_text(text: Any) -> None:
    """Refuse text models that would be captured wrongly.

    Raises:
        SourceError: Rotary positions depend on the data, or attention has dropout.
    """
    rope_type = text.rope_parameters["rope_type"]
    if rope_type not in STATIC_ROPE_TYPES:
        raise SourceError(
            f"config.json: rope_type {rope_type!r} depends on the data and cannot be compiled. "
            f"Supported: {', '.join(STATIC_ROPE_TYPES)}."
        )
    dropout = getattr(text, "attention_dropout", 0) or getattr(text, "dropout", 0)
    if dropout:
        raise SourceError(
            f"config.json: attention dropout {dropout} is not supported; set it to 0, as published configs do."
        )


class Names:
    """The two names of every tensor: as the modules of transformers have it, and as published checkpoints do.

    Args:
        prefixes: (module, published) leading parts; the first that fits is replaced.
    """

    def __init__(self, *prefixes: tuple[str, str]) -> None:
        self.prefixes = prefixes

    def stored(self, name: str) -> str:
        """Module name -> published name."""
        for module, published in self.prefixes:
            if name.startswith(module):
                return published + name.removeprefix(module)
        return name

    def module(self, stored: str) -> str:
        """Published name, or module name as newer versions write it -> module name."""
        if any(stored.startswith(module) for module, _ in self.prefixes):
            return stored
        for module, published in self.prefixes:
            if stored.startswith(published):
                return module + stored.removeprefix(published)
        return stored


def role_by_prefix(name: str, vision: str, projector: str) -> Role:
    """The role of a parameter, from the leading parts of vision tower and projector; a projector may lie in the tower."""
    prefixes: dict[str, Role] = {
        projector: "projector",
        vision: "vision",
        "model.language_model.embed_tokens.": "embedding",
        "lm_head.": "head",
    }
    return next((role for prefix, role in prefixes.items() if name.startswith(prefix)), "language")


def text_inputs(*axes: int) -> tuple[Input, ...]:
    """The inputs about text that every variant has; positions may have several axes."""
    return (
        Input("input_ids", torch.int64, (1, "sequence")),
        Input("position_ids", torch.int64, (*axes, 1, "sequence")),
        Input("text_cu_seqlens", torch.int32, ("samples",)),
    )


def load_processor(load: Callable[[], Any], directory: Path, what: str, image_files: str) -> Any:
    """Load a processor, after a look whether there is a tokenizer at all: without its files transformers makes one of
    nothing but special tokens, and every text becomes empty.

    Raises:
        SourceError: A file is missing or unreadable.
    """
    layouts = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    try:
        if not any(all((directory / name).is_file() for name in layout) for layout in layouts):
            raise FileNotFoundError("it has no tokenizer.")
        return load()
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError for bad files
        raise SourceError(
            f"The processor in {directory} cannot be loaded: {error} A {what} checkpoint has a tokenizer "
            f"(tokenizer.json, or vocab.json and merges.txt) and {image_files}."
        ) from error
