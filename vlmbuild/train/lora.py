"""LoRA adapters on a loaded model: new ones, and adapters from a directory in PEFT's format."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from vlmbuild.adapters.fit import check_fits, trained_parameters, with_module_names
from vlmbuild.adapters.identity import check_base, read_base
from vlmbuild.adapters.lora import AdapterSpec, Lora
from vlmbuild.adapters.peft_files import WEIGHTS_FILE, read_adapter
from vlmbuild.adapters.select import ALL_LINEAR, Targets, choose
from vlmbuild.builder.passes import adapt
from vlmbuild.errors import UsageError
from vlmbuild.runtime.torch.model import VisionLanguageModel, unwrap
from vlmbuild.runtime.torch.vocabulary import set_rows, stored_rows, table_parameters, tables


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target: str | Sequence[str] = ALL_LINEAR,
    *,
    language: bool = True,
    vision: bool = False,
    attention: bool = True,
    mlp: bool = True,
    layers: Sequence[int] | None = None,
    use_rslora: bool = False,
    modules_to_save: Sequence[str] | None = (),
    adapter_name: str = "default",
) -> None:
    """Freeze the model and add a trainable LoRA adapter to its linear layers, plain or quantized, in place.

    The graph, not its name, decides whether a layer is language or vision, attention or MLP.

    Args:
        model: Model from `vlmbuild.load`; may be compiled already.
        r: Rank.
        alpha: Scale is alpha / r; None is 2 r.
        dropout: Probability that a channel of an adapter's input is zeroed, in training.
        target: "all-linear" (the language model and, with `vision`, the vision tower), roles ("language", "vision",
            "projector", or "head" if it is not tied), names as in PEFT ("q_proj"), patterns ("*.layers.0.*"), or several.
        language, vision: Allow layers of the language model, and of the vision tower.
        attention, mlp: Allow layers of attention, and the other layers of blocks.
        layers: Numbers of the blocks to adapt; None is all.
        use_rslora: Scale is alpha / sqrt(r) (arXiv:2312.03732).
        modules_to_save: Modules to train whole, in float32: "lm_head", "embed_tokens", "visual.merger",
            "multi_modal_projector". A head that is tied to the embeddings is trained with them.
        adapter_name: Name for `model.set_adapter`. Adapters that the model has already keep their values, inactive.

    Raises:
        UsageError: A value is out of range, a target or module matches nothing, a module to train is quantized, or the model
            has an adapter of this name already.
    """
    model = unwrap(model)
    _check_free(model, adapter_name)
    lora = Lora(r, 2 * r if alpha is None else alpha, dropout, use_rslora)
    names = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save or ()
    program = model.program if model.base_program is None else model.base_program
    trained = trained_parameters(program, names)
    _check_rows_are_stored(model, trained, model.resized)
    loras = choose(program, Targets(target, language, vision, attention, mlp, layers), lora)
    covered = {module: lora for module, lora in loras.items() if not _inside(module, trained)}
    _add(model, AdapterSpec(covered, tuple(trained), frozenset().union(*trained.values())), adapter_name)


def load_adapter(
    model: nn.Module, directory: str | Path, adapter_name: str = "default", *, allow_other_base: bool = False
) -> None:
    """Add the adapter from a directory in PEFT's format, trainable, and make it the active one.

    An adapter that was trained after `resize_token_embeddings` stores the embeddings and the head whole; the model is resized
    to their rows.

    Args:
        model: Model from `vlmbuild.load`; may be compiled already.
        directory: Directory of the adapter.
        adapter_name: Name for `model.set_adapter`.
        allow_other_base: Load an adapter of `save_adapter` that was trained on other weights or with another processor.

    Raises:
        UsageError: The model has an adapter of this name already, or one of several has modules trained whole.
        SourceError: It is no LoRA adapter, does not fit the model, or was trained on another base; the tensor or the base
            is named, and the model is unchanged.
    """
    model = unwrap(model)
    _check_free(model, adapter_name)
    if not allow_other_base:
        check_base(directory, read_base(Path(directory), WEIGHTS_FILE), model.identity)
    adapter = with_module_names(read_adapter(directory), model.family, directory)
    program = model.program if model.base_program is None else model.base_program
    rows = stored_rows(adapter.trained, model.family) or model.vocabulary
    resizes = rows != model.vocabulary and not model.family.extra_embedding_rows
    if resizes:
        set_rows(program := copy.deepcopy(program), tables(model.family), rows)
    check_fits(program, adapter, directory)
    aliases = {alias: name for alias, name in program.ties.items() if alias in adapter.trained}
    trained = trained_parameters(program, adapter.modules)
    _check_rows_are_stored(model, trained, model.resized or resizes)
    if resizes:
        model.resize_token_embeddings(rows)
    _add(model, AdapterSpec(adapter.loras, tuple(trained), frozenset().union(*trained.values())), adapter_name)
    with torch.no_grad():
        for name, tensor in {**adapter.tensors, **adapter.trained}.items():
            model.get_parameter(aliases.get(name, name)).copy_(tensor)


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the trained parameters: LoRA matrices, and the modules that were trained whole.

    With sharded parameters every process must call it; the first one writes.

    Args:
        model: Model with an adapter; may be compiled or wrapped for several processes.
        directory: Created if missing; an adapter in it is replaced.

    Raises:
        UsageError: The model has no adapter, or is not one from `vlmbuild.load`.
        OutputError: The directory cannot be written.
    """
    model = unwrap(model)
    if model.adapter is None:
        raise UsageError("The model has no adapter to save. Call vlmbuild.add_lora(model, r=16) first.")
    model.save_pretrained(directory)


def _add(model: VisionLanguageModel, spec: AdapterSpec, name: str) -> None:
    if spec.modules and model.adapter_names:
        raise UsageError(
            f"{spec.modules[0]} is trained whole, which only the one adapter of a model can do. Leave modules_to_save out, or "
            f"delete the others first: model.delete_adapter({model.adapter_names[0]!r})."
        )
    model.deactivate_adapter()
    base = copy.deepcopy(model.program)
    adapt(model.program, spec.loras, spec.trained)
    model.requires_grad_(False)
    model.attach_adapter(spec, base, name)


def _check_free(model: VisionLanguageModel, name: str) -> None:
    if name in model.adapter_names:
        raise UsageError(
            f"The model has an adapter {name!r} already. Pass another adapter_name, or call model.delete_adapter({name!r})."
        )


def _check_rows_are_stored(model: VisionLanguageModel, trained: Mapping[str, frozenset[str]], resized: bool) -> None:
    """Raise UsageError for an adapter that would leave out rows of a resized vocabulary."""
    if resized and not table_parameters(model) <= frozenset().union(*trained.values()):
        raise UsageError(
            "The vocabulary of the model was resized, and an adapter without its embeddings and its head would lose the new "
            'rows. Pass modules_to_save=["embed_tokens", "lm_head"] to add_lora, or save the resized model with '
            "model.save_pretrained(DIRECTORY) and build it."
        )


def _inside(module: str, trained: Mapping[str, object]) -> bool:
    return any(f"{module}.".startswith(f"{outer}.") for outer in trained)
