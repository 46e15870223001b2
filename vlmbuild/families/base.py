"""The base class of model families. Only families know a model's name, config and habits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmbuild.errors import SourceError
from vlmbuild.families.batch import ImageCost, PackedBatch
from vlmbuild.families.chat_processor import limit_templates
from vlmbuild.families.config_checks import check_text, check_values
from vlmbuild.families.gguf import ForGguf
from vlmbuild.families.js import ForClients
from vlmbuild.families.processor_checks import check_processor
from vlmbuild.families.traced import TextCore, meta_module
from vlmbuild.ir.program import COMPUTE_DTYPE, Geometry, Input, Role

InputLayout = Literal["sample", "token", "medium"]
"""The rows of a batch's tensor: samples; samples with an entry for every token, which generation repeats for the tokens that
it adds; or the images and videos of all samples in one list."""

IGNORED_CONFIG_KEYS = ("auto_map", "trust_remote_code", "_attn_implementation", "attn_implementation")


class Family(ForClients, ForGguf, ABC):
    """Models with one config class, one host prologue and one set of tensor names.

    Attributes:
        name: Key in `FAMILIES`; stored in programs.
        title: Name for people.
        architectures: Values of `architectures` in config.json that the family reads.
        refused_architectures: Pairs of an architecture that users may take for one of them, and the reason why it is not.
        config_class, model_class: Classes of transformers.
        list_fields: Fields of config.json that are one number elsewhere and a list of them here, such as `patch_size`.
        image_core, text_core: Modules to trace for batches with images, and without.
        vision_prefix, projector_prefix: Module names of the vision tower and the projector, which may lie inside it.
        language_prefix: Module name of the language model without its head.
        processors: Class names of the family's processors.
        input_layout: Processor outputs besides input_ids and attention_mask.
        resizable_keys: Keys of the image processor's `size` that may be lowered without changing the model.
        pads_image_batch: Whether every sample of a batch gets as many images as the one with most, and all are computed.
        extra_embedding_rows: Rows of the embedding table beyond the vocabulary.
        position_axes: Leading sizes of `position_ids`.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    refused_architectures: tuple[tuple[str, str], ...] = ()
    config_class: Any
    model_class: Any
    list_fields: tuple[str, ...] = ()
    image_core: type[TextCore]
    text_core: type[TextCore] = TextCore
    vision_prefix: str
    projector_prefix: str
    language_prefix: str = "model.language_model."
    processors: tuple[str, ...]
    input_layout: Mapping[str, InputLayout]
    resizable_keys: tuple[str, ...] = ()
    pads_image_batch: bool = False
    extra_embedding_rows: int = 0
    position_axes: tuple[int, ...] = ()

    # The model ------------------------------------------------------------------------------------------------------

    def config(self, values: Mapping[str, Any]) -> Any:
        """Read the values of a config.json into transformers' config; keys that name code are left out.

        Raises:
            SourceError: A value has the wrong type, contradicts another, or would be captured wrongly.
        """
        plain = {key: value for key, value in values.items() if key not in IGNORED_CONFIG_KEYS}
        check_values(plain, self.list_fields)  # before transformers makes lists and modules of these sizes
        try:
            config = self.config_class.from_dict(plain)
            check_values(config.to_dict(), self.list_fields)
            check_text(config.get_text_config())
            self.check(config)
            self.geometry(config), self.variants(config), self.constants(config)
        except SourceError:
            raise
        except Exception as error:  # transformers validates with many exception types
            raise SourceError(
                f"config.json is not a valid {self.title} config: {type(error).__name__}: {error}. Restore the published one."
            ) from error
        return config

    @abstractmethod
    def check(self, config: Any) -> None:
        """Raise SourceError for a config that would be captured wrongly."""

    @abstractmethod
    def geometry(self, config: Any) -> Geometry:
        """Describe the model to passes."""

    def variants(self, config: Any) -> dict[str, tuple[Input, ...]]:
        """List the inputs of the variants "image" and "text"."""
        text = (
            Input("input_ids", torch.int64, (1, "sequence")),
            Input("position_ids", torch.int64, (*self.position_axes, 1, "sequence")),
            Input("text_cu_seqlens", torch.int32, ("samples",)),
        )
        return {"image": (*text, *self.image_inputs(config)), "text": text}

    @abstractmethod
    def image_inputs(self, config: Any) -> tuple[Input, ...]:
        """List the inputs that the variant "image" has besides text; sizes that change have names."""

    def module(self, config: Any, variant: str, attention: str) -> nn.Module:
        """Construct the module to trace, on the meta device, in `COMPUTE_DTYPE`, with transformers' parameter names.

        Args:
            config: From `config`.
            variant: A key of `variants`; the module takes its inputs as keyword arguments and returns logits.
            attention: Name of the attention implementation registered with transformers.
        """
        core = self.image_core if variant == "image" else self.text_core
        return core(meta_module(self.model_class, config, attention, COMPUTE_DTYPE))

    def ties(self, config: Any) -> dict[str, str]:
        """Map alias -> parameter for tensors that share storage."""
        if self.extra_embedding_rows or not config.tie_word_embeddings:
            return {}
        return {"lm_head.weight": f"{self.language_prefix}embed_tokens.weight"}

    @abstractmethod
    def rotary_modules(self, config: Any) -> dict[str, nn.Module]:
        """Construct the rotary embeddings, by module name."""

    def constants(self, config: Any) -> dict[str, Tensor]:
        """Compute the tensors that follow from the config (rotary frequencies), by module name."""
        return {
            f"{module}.{name}": tensor
            for module, rotary in self.rotary_modules(config).items()
            for name, tensor in rotary.named_buffers()
            if "original_" not in name  # transformers' copy, for frequencies that change with the length
        }

    def role(self, name: str) -> Role:
        """Tell the role of a parameter from its module name."""
        prefixes: dict[str, Role] = {
            self.projector_prefix: "projector",
            self.vision_prefix: "vision",
            f"{self.language_prefix}embed_tokens.": "embedding",
            "lm_head.": "head",
        }
        return next((role for prefix, role in prefixes.items() if name.startswith(prefix)), "language")

    @property
    def published_prefixes(self) -> tuple[tuple[str, str], ...]:
        """(module, published) leading parts of tensor names; the first match is replaced."""
        towers = ((prefix, prefix.removeprefix("model.")) for prefix in (self.vision_prefix, self.projector_prefix))
        language = ("lm_head.", "language_model.lm_head."), ("model.language_model.", "language_model.model.")
        return (*language, *towers)

    def stored_name(self, name: str) -> str:
        """Translate a module name to the name in published checkpoint files."""
        for module, published in self.published_prefixes:
            if name.startswith(module):
                return published + name.removeprefix(module)
        return name

    def module_name(self, stored: str) -> str:
        """Translate a name in checkpoint files, published or as newer versions write it, to the module name."""
        if any(stored.startswith(module) for module, _ in self.published_prefixes):
            return stored
        for module, published in self.published_prefixes:
            if stored.startswith(published):
                return module + stored.removeprefix(published)
        return stored

    def client_names(self, module: str) -> tuple[str, ...]:
        """List the names of a module elsewhere: as published, and with vLLM's `language_model` around text and head."""
        path = f"{module}."
        names = [self.stored_name(path)]
        if self.role(path) in ("language", "embedding", "head"):
            names.append("language_model." + path.replace("model.language_model.", "model.", 1))
        return tuple(name.removesuffix(".") for name in names)

    # Batches --------------------------------------------------------------------------------------------------------

    def compare_positions(self, batch: Mapping[str, Any], config: Any) -> None:
        """Warn where a forward pass over this batch counts positions otherwise than transformers; its generate never does."""

    @abstractmethod
    def prepare(self, batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
        """Run the host prologue: compute everything that depends on data as tensors, and check every sample.

        Args:
            batch: The processor's output, and `labels` if there are any. Unknown keys are ignored.
            config: From `config`.
            processor: The artifact's; a batch made with higher pixel limits than it has is refused.

        Returns:
            Variant "image" or "text" and its inputs, packed.

        Raises:
            BatchError: The batch contradicts itself, or training on it would be silently wrong.
        """

    def vocabulary(self, config: Any) -> int:
        """Count the rows of the embedding table."""
        return int(config.get_text_config().vocab_size) + self.extra_embedding_rows

    def batch_sizes(self, config: Any, images: Sequence[ImageCost], batch: int, text_tokens: int) -> dict[str, int]:
        """Compute the sizes that the inputs of a variant name, for a batch of equal samples.

        Args:
            config: From `config`.
            images: Images of each sample; without any it is the variant "text".
            batch: Number of samples.
            text_tokens: Tokens of each sample, besides those of its images.
        """
        return {
            "sequence": batch * (text_tokens + sum(image.tokens for image in images)),
            "samples": batch + 2,  # bounds are one more than the samples, and the last is repeated
            "patches": batch * sum(image.patches for image in images),
            "segments": batch * sum(image.segments for image in images) + 2,
        }

    # The processor --------------------------------------------------------------------------------------------------

    def processor(self, directory: Path) -> Any:
        """Load the processor of a checkpoint or artifact directory; works without torchvision.

        Raises:
            SourceError: A processor file is missing or unreadable, or has settings that cannot be computed with.
        """
        layouts = (("tokenizer.json",), ("vocab.json", "merges.txt"))
        try:
            # Without these files transformers makes a tokenizer of special tokens alone, and every text becomes empty.
            if not any(all((directory / name).is_file() for name in layout) for layout in layouts):
                raise FileNotFoundError("it has no tokenizer.")
            processor = self.load_processor(directory)
            if processor.chat_template is None:  # old checkpoints have it in tokenizer_config.json
                processor.chat_template = processor.tokenizer.chat_template
            frames = getattr(getattr(processor, "video_processor", None), "size", None) or {}
            pixels = max(self.processor_pixels(processor.image_processor), *(n for n in dict(frames).values() if n), 0)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError for bad files
            raise SourceError(
                f"The processor in {directory} cannot be loaded: {error} Add the files of a {self.title} checkpoint: a "
                "tokenizer (tokenizer.json, or vocab.json and merges.txt) and preprocessor_config.json or "
                "processor_config.json."
            ) from error
        check_processor(processor.image_processor, pixels, directory)
        return limit_templates(processor)

    def has_processor(self, processor: Any) -> bool:
        """Tell whether a processor is the family's."""
        return type(processor).__name__ in self.processors

    @abstractmethod
    def processor_pixels(self, image_processor: Any) -> int:
        """Compute the most pixels that an image processor makes of an image."""

    @abstractmethod
    def load_processor(self, directory: Path) -> Any:
        """Load the processor; raise whatever transformers raises for bad files."""

    def stock_files(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Complete a checkpoint's processor files, so that transformers' `AutoProcessor` opens them; returns changed ones."""
        return {}

    @abstractmethod
    def media_tokens(self, processor: Any) -> frozenset[int]:
        """List the ids of tokens that mark images and videos, or begin, divide and end them; a model never writes them."""

    def is_media(self, ids: Tensor, media: Tensor, placeholder: int) -> Tensor:
        """Tell which tokens of a processor's `ids` it has written for images and videos: bool (batch, sequence); `media` are
        `media_tokens`, of which `placeholder` stands for an image in a text."""
        return torch.isin(ids, media)

    def joined_tokens(self, processor: Any) -> frozenset[int]:
        """List the ids of text tokens that, next to an image, become one with the processor's own; those are `is_media`."""
        return frozenset()

    @abstractmethod
    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        """Count the tokens that replace the placeholder of an image of this size (in pixels, before it is resized).

        Raises:
            ValueError: The processor refuses the size.
        """

    def limited_size(self, processor: Any, height: int, width: int, limits: Mapping[str, Any]) -> tuple[int, int]:
        """Compute the size of an image with limits of its own, before the processor sees it.

        Args:
            processor: Processor of the model.
            height, width: Size in pixels.
            limits: "min_pixels" and "max_pixels", or "resized_height" and "resized_width".

        Raises:
            ValueError: The model has no such limits, or the processor would change the size again.
        """
        raise ValueError(f"{', '.join(limits)}: {self.title} has no limits for single images")

    @abstractmethod
    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        """Compute the cost of an image of this size (in pixels, before it is resized).

        Args:
            image_processor: transformers' own, of the checkpoint; its `size` has the limits.
            config: From `config`.
            height, width: Size in pixels.

        Raises:
            ValueError: The processor refuses the size.
        """
