"""Measure what quantizing one linear layer does to its block, on batches: the model is run once, one block in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.artifact.files import read_file
from vlmbuild.artifact.safetensors import tensor_bytes
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.errors import UsageError, reason
from vlmbuild.families.images import open_image
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.interpret import run_calls
from vlmbuild.ir.linear_layers import LinearLayer
from vlmbuild.ir.program import Call, Program, Slot, join
from vlmbuild.measure.sensitivity import Loss, plain_source
from vlmbuild.runtime.torch.region import BoundRegion
from vlmbuild.util.progress import Progress

Batch = Mapping[str, Tensor]
_MAX_BYTES = 2**28
"""Size limit of a file of conversations, in bytes: it is read whole."""


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
        lines = read_file(file, _MAX_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:  # also of bytes that are no text
        raise UsageError(
            f"{file} cannot be read: {reason(error)}. Give a file with one JSON conversation per line."
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                messages = json.loads(line)["messages"]
                batch = processor.apply_chat_template(
                    _with_images(messages), tokenize=True, return_dict=True, return_tensors="pt"
                )
            except Exception as error:  # templates and processors raise whatever they like
                raise UsageError(
                    f'{file}, line {number} is not a conversation: {error}. Lines look like {{"messages": [{{"role": "user", '
                    '"content": [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is it?"}]}]}.'
                ) from error
            batches.append(dict(batch))
    if not batches:
        raise UsageError(f"{file} holds no conversation. Give one a line.")
    return batches


def _with_images(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Open the images of messages, within limits that transformers has not."""
    opened = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [_with_image(part) for part in content]
        opened.append({**message, "content": content})
    return opened


def _with_image(part: Mapping[str, Any]) -> Mapping[str, Any]:
    keys = [key for key in ("image", "url", "path", "base64", "image_url") if key in part]
    if part.get("type") not in ("image", "image_url") or not keys:
        return part
    image = part[keys[0]]
    if isinstance(image, Mapping):
        image = image.get("url")
    return {"type": "image", "image": open_image(image, "a message")}


@torch.no_grad()
def output_losses(
    layers: Sequence[LinearLayer],
    form: WeightFormat,
    checkpoint: Checkpoint,
    program: Program,
    batches: Iterable[Batch],
    progress: Progress,
) -> list[Loss]:
    """Measure the squared error of a block's outputs when one of its layers is quantized, relative to their squared norm:
    the mean over all tokens of the batches, computed in float32.

    Args:
        layers: Layers to measure.
        form: Format to measure.
        checkpoint: The source, which is not quantized.
        program: Program after all passes but quantization.
        batches: Outputs of the processor.
        progress: Called with the number of layers that are done.

    Raises:
        BatchError: A batch contradicts itself.
        SourceError: A weight is quantized already.
        UsageError: There is no batch, or no batch runs through a layer.
    """
    graphs = {name: BoundRegion(region, torch.float32, ()).graph for name, region in program.regions.items()}
    constants = checkpoint.family.constants(checkpoint.config)
    wanted = {layer.module: layer for layer in layers}
    sums: dict[str, list[float]] = {}

    def tensor(slot: Slot, name: str) -> Tensor:
        if slot.kind == "constant":
            return constants[name]
        return plain_source(checkpoint, name).whole(checkpoint.weights, torch.float32).float()

    def run_call(call: Call, columns: tuple[list[Tensor], ...]) -> list[list[Tensor]]:
        """Run a block on every batch, and again with each of its layers quantized; a value is a tensor for each batch."""
        names = {join(call.instance, slot.name): slot for slot in program.regions[call.region].slots}
        held = [tensor(slot, name) for name, slot in names.items()]
        inputs = list(zip(*columns, strict=True))
        outputs = [graphs[call.region](*held, *values) for values in inputs]
        for index, name in enumerate(names):
            module = name.removesuffix(".weight")
            if module in wanted and module != name:
                plain = held[index]
                held[index] = form.rounded(plain.flatten(), module).view_as(plain)
                again = [graphs[call.region](*held, *values) for values in inputs]
                held[index] = plain
                _add(sums.setdefault(module, [0.0, 0.0]), outputs, again)
                progress("sensitivity", len(sums), len(layers))
        return [list(column) for column in zip(*outputs, strict=True)]

    for variant_name, states in _prepared(checkpoint, batches).items():
        variant = program.variants[variant_name]
        run_calls(
            variant.calls, {entry.name: [state[entry.name] for state in states] for entry in variant.inputs}, run_call
        )
    if missed := sorted(set(wanted) - set(sums)):
        raise UsageError(f"No calibration batch runs through {missed[0]}. Give batches like those of use, with images.")
    return [Loss(layer, error / max(rows, 1)) for layer in layers for error, rows in [sums[layer.module]]]


def _prepared(checkpoint: Checkpoint, batches: Iterable[Batch]) -> dict[str, list[dict[str, Tensor]]]:
    """Prepare the batches: variant -> values of its inputs, for each batch."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for batch in batches:
        prepared = checkpoint.family.prepare(batch, checkpoint.config)
        found.setdefault(prepared.variant, []).append(
            {name: x.float() if x.is_floating_point() else x for name, x in prepared.tensors.items()}
        )
    if not found:
        raise UsageError("There is no calibration batch. Give some, or leave calibration out.")
    return found


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
