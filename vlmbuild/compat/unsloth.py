"""Unsloth's names and arguments for vision models, over this package's own calls: a notebook changes its imports and runs.

`from unsloth import FastVisionModel` and `from unsloth.trainer import UnslothVisionDataCollator` become
`from vlmbuild import FastVisionModel, UnslothVisionDataCollator`. An argument that has no equivalent here is an error if it
would change what is computed, and a warning if it would not; none is passed over in silence.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmbuild.adapters.peft_files import CONFIG_FILE
from vlmbuild.builder.build import build
from vlmbuild.builder.cache import from_pretrained
from vlmbuild.checkpoint.source import read_json_object, resolve
from vlmbuild.compat.unsloth_arguments import check_others
from vlmbuild.errors import UsageError
from vlmbuild.recipe import DTYPES, Recipe
from vlmbuild.runtime.load import Model, load
from vlmbuild.runtime.torch.model import VisionLanguageModel, unwrap
from vlmbuild.train.collator import VisionDataCollator
from vlmbuild.train.lora import add_lora, load_adapter, save_adapter

_MANIFEST = "manifest.json"


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
        """The model and its processor.

        Args:
            model_name: A hub id, a directory, an artifact, a zoo checkpoint, or the directory of an adapter that names its
                base model.
            max_seq_length: For `UnslothVisionDataCollator`; the model itself has no limit.
            dtype: Compute dtype; None is bfloat16, or an artifact's own.
            load_in_4bit: As NF4; None is yes, unless one of the next three is set or the source is quantized already.
            load_in_8bit: As LLM.int8.
            load_in_16bit, full_finetuning: Unquantized.
            device_map: A device or "auto"; a model is on one device.
            use_gradient_checkpointing: For `for_training`; "unsloth" keeps the inputs of blocks in the host's memory.
            revision: Of a hub id.
            random_state: Seed.
            **others: Unsloth's other arguments; see the module's docstring.

        Raises:
            UsageError: An argument has no equivalent, or two contradict each other.
        """
        check_others("FastVisionModel.from_pretrained", others)
        torch.manual_seed(random_state)
        adapter = Path(model_name) if (Path(model_name) / CONFIG_FILE).is_file() else None
        base = str(model_name) if adapter is None else _base_of(adapter)
        device, wanted = _device(device_map), str(dtype or "bfloat16").removeprefix("torch.")
        if wanted not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is none that a model computes in: {', '.join(DTYPES)}, or None.")
        if (Path(base) / _MANIFEST).is_file():
            opened, processor = load(base, device=device, dtype=None if dtype is None else wanted)
            model = _trainable(opened, base)
            found = {recipe.format.name for region in model.program.regions.values() for recipe in region.recipes}
            _check_formats(base, found, load_in_4bit, load_in_8bit, load_in_16bit or full_finetuning)
            if revision is not None:
                raise UsageError(f"revision={revision!r}: {base} is an artifact, and artifacts have none.")
        else:
            form = _format(base, revision, load_in_4bit, load_in_8bit, load_in_16bit or full_finetuning)
            recipe = {"dtype": wanted} | ({} if form is None else {"quantize": form})
            opened, processor = from_pretrained(base, revision=revision, device=device, **recipe)
            model = _trainable(opened, base)
        if adapter is not None:
            load_adapter(model, adapter)
        elif not full_finetuning:
            model.requires_grad_(False)
        settings: Any = model
        settings.max_seq_length, settings.checkpointing_choice = max_seq_length, use_gradient_checkpointing
        settings.save_pretrained_merged = partial(FastVisionModel.save_pretrained_merged, model)
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
        """`vlmbuild.add_lora` by Unsloth's names; returns the model.

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
        settings: Any = model
        settings.checkpointing_choice = use_gradient_checkpointing
        if max_seq_length is not None:
            settings.max_seq_length = max_seq_length
        return FastVisionModel.for_training(model)

    @staticmethod
    def for_training(
        model: VisionLanguageModel, use_gradient_checkpointing: bool | str | None = None
    ) -> VisionLanguageModel:
        """Training mode, with gradient checkpointing as it was asked for; returns the model."""
        chosen = getattr(model, "checkpointing_choice", True)
        if use_gradient_checkpointing is not None:
            chosen = use_gradient_checkpointing
        if chosen:
            model.gradient_checkpointing_enable(offload=chosen == "unsloth" and model.device.type == "cuda")
        else:
            model.gradient_checkpointing_disable()
        return model.train()

    @staticmethod
    def for_inference(model: VisionLanguageModel) -> VisionLanguageModel:
        """Evaluation mode; returns the model."""
        return model.eval()

    @staticmethod
    def save_pretrained(model: VisionLanguageModel, save_directory: str | Path) -> None:
        """`model.save_pretrained`: the adapter, in PEFT's format."""
        model.save_pretrained(save_directory)

    @staticmethod
    def save_pretrained_merged(
        model: VisionLanguageModel,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        **others: Any,
    ) -> None:
        """The adapter alone ("lora"), or the artifact with the adapter merged ("merged_16bit", "merged_4bit"), with processor
        and chat template, which any reader of the source's checkpoint opens.

        Args:
            model: With an adapter.
            save_directory: For a merged model: it must not exist.
            tokenizer: The processor; its files are the artifact's, so it is not needed.
            save_method: What to write.

        Raises:
            UsageError: The method is unknown, or there is no adapter.
        """
        check_others("save_pretrained_merged", others)
        inner = unwrap(model)
        if save_method == "lora":
            save_adapter(inner, save_directory)
            return
        formats = {"merged_16bit": "none", "merged_4bit": "nf4", "merged_4bit_forced": "nf4"}
        if save_method not in formats:
            raise UsageError(f"save_method {save_method!r} is unknown; it is lora, {', '.join(formats)}.")
        if inner.path is None:
            raise UsageError("The model was not loaded from an artifact, so there are no weights to merge into.")
        dtype = str(inner.dtype).removeprefix("torch.")
        recipe = Recipe.from_mapping({"dtype": dtype, "quantize": formats[save_method]}, where="save_pretrained_merged")
        with tempfile.TemporaryDirectory() as adapter:
            save_adapter(inner, adapter)
            build(inner.path, save_directory, recipe, adapter=adapter)


class UnslothVisionDataCollator:
    """`vlmbuild.VisionDataCollator` by Unsloth's names.

    Args:
        model: From `FastVisionModel.from_pretrained`; its `max_seq_length` holds where none is given.
        processor: The model's.
        max_seq_length: Most tokens of a sample; what is longer loses its end, but never a part of an image.
        formatting_func: Makes a sample of what the data set holds.
        train_on_responses_only: Loss on what the assistant says; else on all the text.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_seq_length: int | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        train_on_responses_only: bool = False,
        **others: Any,
    ) -> None:
        check_others("UnslothVisionDataCollator", others)
        length = max_seq_length or getattr(unwrap(model), "max_seq_length", None)
        self.formatting_func = formatting_func
        self.collator = VisionDataCollator(processor, max_length=length, responses_only=train_on_responses_only)

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The batch of these samples, with labels."""
        if self.formatting_func is not None:
            examples = [self.formatting_func(example) for example in examples]
        return self.collator(examples)


def is_bf16_supported() -> bool:
    """Whether models compute in bfloat16 here; CPUs do."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


def _trainable(model: Model, source: str) -> VisionLanguageModel:
    if not isinstance(model, VisionLanguageModel):
        raise UsageError(f"{source} is an artifact that cannot train. Build it with --target trainable.")
    return model


def _format(source: str, revision: str | None, four: bool | None, eight: bool, plain: bool) -> str | None:
    """What `quantize` is; None keeps a source that is quantized already."""
    if eight and plain:
        raise UsageError("load_in_8bit and load_in_16bit (or full_finetuning) exclude each other.")
    config = resolve(source, revision=revision, weights=False).config().get("quantization_config")
    if isinstance(config, Mapping):
        if not plain:
            _check_formats(source, {"int8" if config.get("load_in_8bit") else "nf4"}, four, eight, plain)
        return "none" if plain else None
    return None if plain else "int8" if eight else None if four is False else "nf4"


def _check_formats(source: str, found: set[str], four: bool | None, eight: bool, plain: bool) -> None:
    """Hold what is asked for against the formats that a quantized source or artifact has."""
    asked = (
        "load_in_8bit" if eight else "load_in_16bit (or full_finetuning)" if plain else "load_in_4bit" if four else ""
    )
    fits = {"load_in_8bit": "int8" in found, "load_in_4bit": bool(found & {"nf4", "fp4"}), "": True}.get(
        asked, not found
    )
    if not fits or (four is False and not (eight or plain) and found & {"nf4", "fp4"}):
        raise UsageError(
            f"{asked or 'load_in_4bit=False'}: {source} holds {', '.join(sorted(found)) or 'unquantized'} weights. Leave the "
            "argument out, or build another artifact (vlmbuild build --quantize ...)."
        )


def _device(device_map: Any) -> str:
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map in (None, "auto", "sequential", "balanced"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    if isinstance(device_map, str | torch.device):
        return str(device_map)
    raise UsageError(f"device_map {device_map!r}: a model is on one device. Name it, or say 'auto'.")


def _base_of(adapter: Path) -> str:
    try:
        base = read_json_object(adapter / CONFIG_FILE, "Is it an adapter in PEFT's format?").get(
            "base_model_name_or_path"
        )
    except json.JSONDecodeError as error:
        raise UsageError(f"{adapter / CONFIG_FILE} is not JSON: {error}") from error
    if not base:
        raise UsageError(
            f"{adapter} does not name its base model. Load the base with from_pretrained, then "
            "vlmbuild.load_adapter(model, directory)."
        )
    return str(base)
