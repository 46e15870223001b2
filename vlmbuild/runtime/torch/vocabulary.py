"""Resizing the vocabulary of a loaded model: rows of its embeddings and its head for added or dropped tokens."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.families import Family
from vlmbuild.families.config_checks import check_text
from vlmbuild.ir.program import Program
from vlmbuild.runtime.torch.modules import EMBEDDINGS, HEAD
from vlmbuild.runtime.torch.program_model import ProgramModel


def tables(family: Family) -> tuple[str, str]:
    """Name the parameters with a row for every token: of the embeddings and of the head."""
    return f"{family.language_prefix}{EMBEDDINGS}.weight", f"{HEAD}.weight"


def resize_vocabulary(model: ProgramModel, rows: int | None, multiple: int | None, mean: bool) -> None:
    """Give the embeddings and the head of a model `rows` rows, or the next multiple; see `resize_token_embeddings`.

    Raises:
        UsageError: A number is not a positive integer, or the model cannot be resized; it is unchanged.
    """
    for name, number in (("new_num_tokens", rows), ("pad_to_multiple_of", multiple)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise UsageError(f"resize_token_embeddings: {name} is {number!r}. Pass a whole number, at least 1.")
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    before = model.vocabulary
    step = multiple or 1
    after = -(-(rows or before) // step) * step
    if after == before:
        return
    _check_resizable(model)
    _check_tokens(model, after)
    resized = model.resized_tables(embeddings.weight, head.weight, after, mean)
    for module, new in zip((embeddings, head), resized, strict=True):
        module.register_parameter("weight", nn.Parameter(new, requires_grad=module.weight.requires_grad))
    set_rows(model.program, tables(model.family), after)
    model.tie_weights()
    model.config.get_text_config().vocab_size = after
    model.vocabulary, model.resized = after, True
    model._cached.clear()


def set_rows(program: Program, names: Collection[str], rows: int) -> None:
    """Give the slots of the tables with these names another number of rows, in place."""
    for region in program.regions.values():
        for node, slot in region.slot_nodes().items():
            if slot.name in names and "val" in node.meta:
                node.meta["val"] = node.meta["val"].new_empty((rows, *slot.shape[1:]))
        region.slots = tuple(
            replace(slot, shape=(rows, *slot.shape[1:])) if slot.name in names else slot for slot in region.slots
        )


def set_config_rows(values: dict[str, Any], rows: int) -> None:
    """Set the size of the vocabulary in the values of a config.json, in place."""
    text = values.get("text_config")
    for owner in (text, values):
        if isinstance(owner, dict) and (owner is text or "vocab_size" in owner or not isinstance(text, dict)):
            owner["vocab_size"] = rows


def table_parameters(model: ProgramModel) -> frozenset[str]:
    """Return the parameters that hold the tables: one if the head is tied to the embeddings, else two."""
    return frozenset(model.program.ties.get(name, name) for name in tables(model.family))


def _check_resizable(model: ProgramModel) -> None:
    if model.family.extra_embedding_rows:
        raise UsageError(
            f"resize_token_embeddings: the embeddings of {model.family.title} have {model.family.extra_embedding_rows} rows "
            "after the vocabulary, for the image token, and ids of added tokens come after those: no checkpoint has a head "
            "for them. Use reserved tokens of the tokenizer instead of added ones."
        )
    if model.adapter is not None:
        raise UsageError(
            "resize_token_embeddings: the model has an adapter. Resize before vlmbuild.add_lora or vlmbuild.load_adapter."
        )
    slots = dict(model.program.slots())
    for name in sorted(table_parameters(model)):
        if name not in slots or slots[name].kind != "parameter":
            module = name.removesuffix(".weight")
            raise UsageError(
                f"resize_token_embeddings: {module} is quantized, and has no rows that could be added. Build the artifact "
                f"with --skip '{module}*'."
            )
        if isinstance(model.get_parameter(name), DTensor):
            raise UsageError(f"resize_token_embeddings: {name} is sharded. Resize before vlmbuild.shard.")


def _check_tokens(model: ProgramModel, rows: int) -> None:
    """Raise UsageError if a token that the config names would have no row."""
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size = rows
    try:
        check_text(config.get_text_config())
        model.family.check(config)
    except SourceError as error:
        raise UsageError(
            f"resize_token_embeddings: {rows} rows leave out a token of the model. Pass a new_num_tokens above its id. "
            f"The config names it: {error}"
        ) from error


def stored_rows(trained: Mapping[str, torch.Tensor], family: Family) -> int | None:
    """Return the number of rows of the tables among an adapter's whole parameters; None if no table is there."""
    return next((len(trained[name]) for name in tables(family) if name in trained), None)
