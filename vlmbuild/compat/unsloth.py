"""Unsloth's names and arguments for vision models, over this package's own calls: a notebook changes its imports and runs.

`from unsloth import FastVisionModel` and `from unsloth.trainer import UnslothVisionDataCollator` become
`from vlmbuild import FastVisionModel, UnslothVisionDataCollator`. An argument without an equivalent here is an error if it
would change results, and a warning otherwise; none is ignored silently.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vlmbuild.adapters.peft_files import CONFIG_FILE
from vlmbuild.artifact.paths import MANIFEST_NAME
from vlmbuild.builder.build import build
from vlmbuild.builder.cache import from_pretrained
from vlmbuild.compat.unsloth_arguments import base_of, check_formats, check_others, device_name, quantize_format
from vlmbuild.compat.unsloth_tokenizer import with_tokenizer
from vlmbuild.errors import UsageError
from vlmbuild.recipe import DTYPES, Recipe
from vlmbuild.runtime.hf import Model
from vlmbuild.runtime.load import load
from vlmbuild.runtime.torch.model import VisionLanguageModel, unwrap
from vlmbuild.train.collator import VisionDataCollator
from vlmbuild.train.lora import add_lora, load_adapter, save_adapter
from vlmbuild.util.dtypes import dtype_name

_MERGED_FORMATS = {"merged_16bit": "none", "merged_4bit": "nf4", "merged_4bit_forced": "nf4"}


@dataclass(slots=True)
class _Settings:
    """Unsloth's settings of a model.

    Attributes:
        max_seq_length: Most tokens of a sample; None has no limit.
        checkpointing: Gradient checkpointing in training; "unsloth" keeps the inputs of blocks in host memory.
    """

    max_seq_length: int | None = None
    checkpointing: bool | str = True


_SETTINGS: WeakKeyDictionary[VisionLanguageModel, _Settings] = WeakKeyDictionary()


class FastVisionModel:
    """Unsloth's entry points; models are this package's own."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        device_map: Any = "sequential",
        use_gradient_checkpointing: bool | str = "unsloth",
        revision: str | None = None,
        random_state: int = 3407,
        **others: Any,
    ) -> tuple[VisionLanguageModel, Any]:
        """Return the model and its processor.

        Args:
            model_name: A hub id, a directory, an artifact, a zoo checkpoint, or the directory of an adapter that names its
                base model.
            max_seq_length: Limit for `UnslothVisionDataCollator`; the model itself has none.
            dtype: Compute dtype; None is bfloat16, or an artifact's own.
            load_in_4bit: Load as NF4; None is yes, unless one of the next three is set or the source is quantized already.
            load_in_8bit: Load as LLM.int8.
            load_in_16bit, full_finetuning: Load unquantized.
            device_map: A device or "auto"; a model is on one device.
            use_gradient_checkpointing: Default of `for_training`; "unsloth" keeps the inputs of blocks in host memory.
            revision: Branch, tag or commit of a hub id.
            random_state: Seed.
            **others: Unsloth's other arguments; see the module's docstring.

        Raises:
            UsageError: An argument has no equivalent, or two contradict each other.
        """
        check_others("FastVisionModel.from_pretrained", others)
        torch.manual_seed(random_state)
        adapter = Path(model_name) if (Path(model_name) / CONFIG_FILE).is_file() else None
        base = str(model_name) if adapter is None else base_of(adapter)
        device, computed = device_name(device_map), dtype_name(dtype or "bfloat16")
        if computed not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is none that a model computes in. Pass {', '.join(DTYPES)}, or None.")
        if (Path(base) / MANIFEST_NAME).is_file():
            opened, processor = load(base, device=device, dtype=None if dtype is None else computed)
            model = _trainable(opened, base)
            formats = {recipe.format.name for region in model.program.regions.values() for recipe in region.recipes}
            check_formats(base, formats, load_in_4bit, load_in_8bit, load_in_16bit or full_finetuning)
            if revision is not None:
                raise UsageError(f"revision={revision!r}: {base} is an artifact, and artifacts have none.")
        else:
            form = quantize_format(base, revision, load_in_4bit, load_in_8bit, load_in_16bit or full_finetuning)
            recipe = {"dtype": computed} | ({} if form is None else {"quantize": form})
            opened, processor = from_pretrained(base, revision=revision, device=device, **recipe)
            model = _trainable(opened, base)
        if adapter is not None:
            load_adapter(model, adapter)
        elif not full_finetuning:
            model.requires_grad_(False)
        _SETTINGS[model] = _Settings(max_seq_length, use_gradient_checkpointing)
        model.merged_writer = FastVisionModel.save_pretrained_merged
        return model, processor

    @staticmethod
    def get_peft_model(
        model: VisionLanguageModel,
        r: int = 16,
        target_modules: str | Sequence[str] | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        layers_to_transform: Sequence[int] | int | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        **others: Any,
    ) -> VisionLanguageModel:
        """Call `vlmbuild.add_lora` by Unsloth's names; return the model.

        Raises:
            UsageError: As `add_lora`, or an argument has no equivalent.
        """
        check_others("FastVisionModel.get_peft_model", others)
        torch.manual_seed(random_state)
        add_lora(
            model,
            r,
            float(lora_alpha),
            lora_dropout,
            "all-linear" if target_modules is None else target_modules,
            language=finetune_language_layers,
            vision=finetune_vision_layers,
            attention=finetune_attention_modules,
            mlp=finetune_mlp_modules,
            layers=[layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save or (),
        )
        settings = _SETTINGS.setdefault(unwrap(model), _Settings())
        settings.checkpointing = use_gradient_checkpointing
        if max_seq_length is not None:
            settings.max_seq_length = max_seq_length
        return FastVisionModel.for_training(model)

    @staticmethod
    def for_training(
        model: VisionLanguageModel, use_gradient_checkpointing: bool | str | None = None
    ) -> VisionLanguageModel:
        """Set training mode, with gradient checkpointing as passed here or before; return the model."""
        choice = use_gradient_checkpointing
        if choice is None:
            choice = _settings(model).checkpointing
        if choice:
            model.gradient_checkpointing_enable(offload=choice == "unsloth" and model.device.type == "cuda")
        else:
            model.gradient_checkpointing_disable()
        return model.train()

    @staticmethod
    def for_inference(model: VisionLanguageModel) -> VisionLanguageModel:
        """Set evaluation mode; return the model."""
        return model.eval()

    @staticmethod
    def save_pretrained(model: VisionLanguageModel, save_directory: str | Path) -> None:
        """Write the adapter in PEFT's format, as `model.save_pretrained` does."""
        model.save_pretrained(save_directory)

    @staticmethod
    def save_pretrained_merged(
        model: VisionLanguageModel,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        **others: Any,
    ) -> None:
        """Write the adapter alone ("lora"), or the artifact with the adapter merged ("merged_16bit", "merged_4bit").

        A merged artifact has processor and chat template, and any reader of the source's checkpoint opens it.

        Args:
            model: A model with an adapter.
            save_directory: Output; a merged model needs one that does not exist.
            tokenizer: Processor, or tokenizer, to save with a merged model: added tokens and a changed chat template are
                kept. None saves the artifact's. For "lora" it has no effect, with a warning.
            save_method: "lora", "merged_16bit" or "merged_4bit".

        Raises:
            UsageError: The method is unknown, there is no adapter, or the tokenizer does not fit the model.
        """
        inner = unwrap(model)
        if save_method == "lora":
            check_others("save_pretrained_merged", others if tokenizer is None else others | {"tokenizer": tokenizer})
            save_adapter(inner, save_directory)
            return
        check_others("save_pretrained_merged", others)
        if save_method not in _MERGED_FORMATS:
            raise UsageError(f"save_method {save_method!r} is unknown. Pass lora, {', '.join(_MERGED_FORMATS)}.")
        if inner.path is None:
            raise UsageError("The model has no artifact to merge into. Load it with FastVisionModel.from_pretrained.")
        options = {"dtype": dtype_name(inner.dtype), "quantize": _MERGED_FORMATS[save_method]}
        recipe = Recipe.from_mapping(options, where="save_pretrained_merged")
        with tempfile.TemporaryDirectory() as adapter, with_tokenizer(inner, inner.path, tokenizer) as source:
            save_adapter(inner, adapter)
            # The adapter is this model's, whatever its tokenizer has become.
            build(source, save_directory, recipe, adapter=adapter, allow_other_base=True)


class UnslothVisionDataCollator:
    """`vlmbuild.VisionDataCollator` by Unsloth's names.

    Args:
        model: From `FastVisionModel.from_pretrained`; its `max_seq_length` is the default here.
        processor: The model's processor.
        max_seq_length: Most tokens of a sample; longer ones lose their end, but never a part of an image.
        formatting_func: Converts an entry of the data set to a sample.
        train_on_responses_only: Loss on the assistant's responses only; else on all the text.
        ignore_columns: Columns of samples to leave out; others that are not read are errors.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_seq_length: int | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        train_on_responses_only: bool = False,
        ignore_columns: Collection[str] = (),
        **others: Any,
    ) -> None:
        check_others("UnslothVisionDataCollator", others)
        length = _settings(model).max_seq_length if max_seq_length is None else max_seq_length
        self.formatting_func = formatting_func
        self.collator = VisionDataCollator(
            processor, max_length=length, responses_only=train_on_responses_only, ignore_columns=ignore_columns
        )

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Return the batch of these samples, with labels."""
        if self.formatting_func is not None:
            examples = [self.formatting_func(example) for example in examples]
        return self.collator(examples)


def is_bf16_supported() -> bool:
    """Return whether models compute in bfloat16 here; CPUs do."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


def _settings(model: Any) -> _Settings:
    return _SETTINGS.get(unwrap(model), _Settings())


def _trainable(model: Model, source: str) -> VisionLanguageModel:
    if not isinstance(model, VisionLanguageModel):
        raise UsageError(f"{source} is an artifact that cannot train. Build it with --target trainable.")
    return model
