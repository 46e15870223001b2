"""Measure what quantizing one linear layer does to its block, on batches: the model is run once, one block in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.artifact.safetensors import tensor_bytes
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.interpret import run_calls
from vlmbuild.ir.linear_layers import LinearLayer
from vlmbuild.ir.program import Call, Program, Region, join
from vlmbuild.measure.sensitivity import Loss
from vlmbuild.runtime.torch.region import BoundRegion
from vlmbuild.util.progress import Progress

Batch = Mapping[str, Tensor]


def batches_digest(batches: Sequence[Batch]) -> str:
    """Hash batches (names, dtypes, shapes and bytes) to a SHA-256 in hex; "" for none."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest() if batches else ""


def conversation_batches(file: Path, processor: Any) -> list[Batch]:
    """Make a batch of each line of a file of conversations: {"messages": [...]} in the form of chat templates, images by path.

    Raises:
        UsageError: A line is not such, or an image cannot be read; the line is named.
    """
    batches: list[Batch] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}. Give a file of one JSON conversation a line.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                messages = json.loads(line)["messages"]
                batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
            except Exception as error:  # templates and processors raise whatever they like
                raise UsageError(
                    f'{file}, line {number} is not a conversation: {error}. Lines look like {{"messages": [{{"role": "user", '
                    '"content": [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is it?"}]}]}.'
                ) from error
            batches.append(dict(batch))
    if not batches:
        raise UsageError(f"{file} holds no conversation. Give one a line.")
    return batches


@torch.no_grad()
def output_losses(
    program: Program,
    family: Family,
    config: Any,
    batches: Iterable[Batch],
    layers: Sequence[LinearLayer],
    form: WeightFormat,
    weights: CheckpointWeights,
    tensors: Mapping[str, SourceTensor],
    progress: Progress,
) -> list[Loss]:
    """Measure the squared error of a block's outputs when one of its layers is quantized, relative to their squared norm.

    It is the mean over all tokens of the batches, computed in float32.

    Args:
        program: Program after all passes but quantization.
        family: The program's family.
        config: The transformers config.
        batches: Outputs of the processor.
        layers: Layers to measure.
        form: Format to measure.
        weights: Unquantized weights of the source.
        tensors: The source's parameters by module name.
        progress: Called with the number of layers that are done.

    Raises:
        BatchError: A batch contradicts itself.
        UsageError: There is no batch, or no batch runs through a layer.
    """
    graphs = {name: BoundRegion(region, torch.float32, ()).graph for name, region in program.regions.items()}
    constants = family.constants(config)
    wanted = {layer.module: layer for layer in layers}
    sums: dict[str, list[float]] = {}

    def run_call(call: Call, columns: tuple[list[Tensor], ...]) -> list[list[Tensor]]:
        """Run a block on every batch, and again with each of its layers quantized; a value is a tensor for each batch."""
        region = program.regions[call.region]
        held = _weights_of(region, call, weights, tensors, constants)
        inputs = list(zip(*columns, strict=True))
        outputs = [graphs[call.region](*held, *values) for values in inputs]
        for index, layer in _measured(region, call, wanted):
            plain = held[index]
            held[index] = form.rounded(plain.flatten(), layer.module).view_as(plain)
            again = [graphs[call.region](*held, *values) for values in inputs]
            held[index] = plain
            _add(sums.setdefault(layer.module, [0.0, 0.0]), outputs, again)
            progress("sensitivity", len(sums), len(layers))
        return [list(column) for column in zip(*outputs, strict=True)]

    for variant_name, states in _prepared(family, config, batches).items():
        variant = program.variants[variant_name]
        run_calls(
            variant.calls, {entry.name: [state[entry.name] for state in states] for entry in variant.inputs}, run_call
        )
    if missed := sorted(set(wanted) - set(sums)):
        raise UsageError(f"No calibration batch runs through {missed[0]}. Give batches like those of use, with images.")
    return [Loss(layer, error / max(rows, 1)) for layer in layers for error, rows in [sums[layer.module]]]


def _prepared(family: Family, config: Any, batches: Iterable[Batch]) -> dict[str, list[dict[str, Tensor]]]:
    """Prepare the batches: variant -> values of its inputs, for each batch."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for batch in batches:
        prepared = family.prepare(batch, config)
        values = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in prepared.tensors.items()
        }
        found.setdefault(prepared.variant, []).append(values)
    if not found:
        raise UsageError("There is no calibration batch. Give some, or leave calibration out.")
    return found


def _weights_of(
    region: Region,
    call: Call,
    weights: CheckpointWeights,
    tensors: Mapping[str, SourceTensor],
    constants: Mapping[str, Tensor],
) -> list[Tensor]:
    names = [join(call.instance, slot.name) for slot in region.slots]
    return [
        constants[name] if slot.kind == "constant" else weights.read(tensors[name].name).float()
        for name, slot in zip(names, region.slots, strict=True)
    ]


def _measured(region: Region, call: Call, wanted: Mapping[str, LinearLayer]) -> Iterator[tuple[int, LinearLayer]]:
    for index, slot in enumerate(region.slots):
        module = join(call.instance, slot.name.removesuffix(".weight"))
        if module in wanted and slot.name.endswith(".weight"):
            yield index, wanted[module]


def _add(sums: list[float], outputs: Sequence[tuple[Tensor, ...]], again: Sequence[tuple[Tensor, ...]]) -> None:
    """Add the squared errors of all rows, relative to the row, since what reads a row normalizes it; and their number."""
    for exact, changed in zip(outputs, again, strict=True):
        for one, other in zip(exact, changed, strict=True):
            if torch.equal(one, other):
                continue  # an output that does not depend on the layer
            rows, errors = one.double().flatten(0, -2), (one.double() - other.double()).flatten(0, -2)
            norms = rows.square().sum(-1)
            sums[0] += (errors.square().sum(-1) / norms.clamp(min=1e-30)).sum().item()
            sums[1] += len(rows)
