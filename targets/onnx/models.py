"""A program as ONNX models: the vision encoder, the token embeddings, and the decoder with its key-value cache.

Names of inputs and outputs are those of transformers.js; where it knows no such model, they go on in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch

from vlmbuild.families import ClientVision
from vlmbuild.ir.dims import Dim, Size
from vlmbuild.ir.program import COMPUTE_DTYPE, Input, Program, Variant
from vlmbuild.kv_cache.program import CROSS, PAST, PRESENT, STEP, TOKENS, TOTAL
from vlmbuild.runtime.onnx.decoding import DECODER, EMBED, EMBEDS, FEATURES, KEEP, LOGITS, TEXT_DECODER, VISION
from vlmbuild.targets.onnx.blocks import LOOKAHEAD, run_lookahead
from vlmbuild.targets.onnx.graph_builder import GraphBuilder
from vlmbuild.targets.onnx.layout import DataFile, Weights
from vlmbuild.targets.onnx.operators import table
from vlmbuild.targets.onnx.parts import Part, cut, embedded_tokens
from vlmbuild.targets.onnx.prologue import add_prologue
from vlmbuild.targets.onnx.translate import Translator

_PAST = Dim.named("past")
_NAMES = {
    Dim.named("batch"): "batch_size",  # the one symbol that transformers.js fills in when it makes an empty cache
    Dim.named("new"): "sequence_length",
    _PAST: "past_sequence_length",
    TOTAL: "total_sequence_length",
}


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """One file's graph, and where its weights lie. Several may share a data file."""

    stem: str
    proto: onnx.ModelProto
    data: DataFile


def onnx_models(
    program: Program, weights: Weights, client: ClientVision | None, compute: torch.dtype, suffix: str = ""
) -> list[OnnxModel]:
    """Build all models of a program with a dynamic key-value cache; without a client's vision prologue they take the
    program's own inputs. All stems end with `suffix`.

    Raises:
        PassError: An operator has no translation.
    """
    maker = _Maker(program, weights, compute, suffix, client is not None and client.blocks)
    step = STEP if STEP in program.variants else "image" if maker.parts() > 1 else "text"
    models = [maker.vision(client), maker.embed(), maker.decoder(DECODER, step, maker.data(DECODER))]
    if step == STEP:  # without images, blocks that read them are left out
        models.append(maker.decoder(TEXT_DECODER, "text", models[-1].data))
    return models


@dataclass(frozen=True, slots=True)
class _Maker:
    program: Program
    weights: Weights
    compute: torch.dtype
    suffix: str
    marked: bool
    """True if the last column of features and embeddings marks image tokens."""

    def data(self, stem: str) -> DataFile:
        return DataFile(f"{stem}{self.suffix}.onnx_data")

    def vision(self, client: ClientVision | None) -> OnnxModel:
        variant = self.program.variants["image"]
        wanted = variant.image_values()
        part = cut(self.program, variant, (), wanted)
        builder, data = GraphBuilder(self.compute), self.data(VISION)
        if client is not None:
            values = add_prologue(builder, client)
        else:
            inputs = [entry for entry in variant.inputs if entry.name in part.inputs]
            values = {entry.name: builder.take_input(entry.name, entry.dtype, _shape(entry.shape)) for entry in inputs}
        self._translate(builder, data, part, values)
        for name in wanted:
            shown = name if name.startswith(CROSS) else FEATURES
            if shown == FEATURES and client is not None and client.restores:
                values[name] = builder.op("Gather", values[name], values[client.outputs[-1]], axis=0)
            shape = self._result_shape(variant, name)
            if shown == FEATURES and self.marked:
                values[name] = builder.op(
                    "Pad", values[name], builder.constant([0, 0, 0, 1]), builder.constant(1, self.compute)
                )
                shape[-1] = self.columns()
            self._give(builder, shown, values[name], shape)
        return OnnxModel(VISION + self.suffix, builder.model(VISION), data)

    def embed(self) -> OnnxModel:
        variant = self.program.variants["text"]
        (name,) = embedded_tokens(self.program, variant)
        builder, data = GraphBuilder(self.compute), self.data(EMBED)
        tokens = ["batch_size", "sequence_length"]
        values = {"input_ids": builder.reshape(builder.take_input("input_ids", torch.int64, tokens), [1, -1])}
        self._translate(builder, data, cut(self.program, variant, (), [name]), values)
        batch = builder.size("input_ids", 0)
        width, whole = self._width(), self.columns()
        embeds = builder.reshape(values[name], [batch, -1, width])
        if whole > width:  # zeros where images would have more
            embeds = builder.op("Pad", embeds, builder.constant([0] * 5 + [whole - width]))
        self._give(builder, EMBEDS, embeds, [*tokens, whole])
        return OnnxModel(EMBED + self.suffix, builder.model(EMBED), data)

    def decoder(self, stem: str, name: str, data: DataFile) -> OnnxModel:
        variant = self.program.variants[name]
        embedded = embedded_tokens(self.program, variant)
        *_, head = variant.calls
        (hidden,) = head.inputs
        before = cut(self.program, variant, embedded, [hidden, *variant.presents])
        after = cut(self.program, variant, [hidden], [variant.output])
        builder, width = GraphBuilder(self.compute), self._width()
        whole, count = self.columns(), len(embedded)
        embeds = builder.take_input(EMBEDS, self.compute, ["batch_size", "sequence_length", whole])
        row = builder.reshape(embeds, [1, -1, whole])
        values: dict[str, str] = {}
        if self.marked:
            row, marks = builder.op("Split", row, builder.constant([whole - 1, 1]), axis=-1, outputs=2)
            values[LOOKAHEAD] = run_lookahead(builder, builder.reshape(marks, [builder.size(EMBEDS, 0), -1]))
        pieces = builder.op("Split", row, axis=-1, num_outputs=count, outputs=count) if count > 1 else (row,)
        values |= zip(embedded, pieces, strict=True)
        for entry in variant.inputs:
            if entry.name in before.inputs and entry.name not in values:
                values[entry.name] = self._take(builder, entry)
        builder.take_input(KEEP, torch.int64, [])
        self._translate(builder, data, before, values)
        batch = builder.size(EMBEDS, 0)
        values[hidden] = self._last(builder, values[hidden], batch, width)
        self._translate(builder, data, after, values)
        vocabulary = self.program.regions[head.region].results()[0].meta["val"].shape[-1]
        logits = builder.reshape(values[variant.output], [batch, -1, vocabulary])
        self._give(builder, LOGITS, logits, ["batch_size", "kept_length", vocabulary])
        shapes = {entry.name: entry.shape for entry in variant.inputs}
        for present in variant.presents:
            past = shapes[present.replace(PRESENT, PAST, 1)]
            sizes = [TOTAL if size == _PAST else size for size in past]
            self._give(builder, present, values[present], _shape(sizes))
        return OnnxModel(stem + self.suffix, builder.model(stem), data)

    def _translate(self, builder: GraphBuilder, data: DataFile, part: Part, values: dict[str, str]) -> None:
        """Translate the calls of a part; `values` gets their results."""
        translator = Translator(builder, table(self.weights.packed))
        for needed in part.calls:
            region = self.program.regions[needed.call.region]
            builder.scope = needed.call.instance or region.name
            names = self.weights.declare(builder, data, region, needed.call.instance, needed.nodes)
            activations = region.placeholders()[len(region.slots) :]
            read = ((n, value) for n, value in zip(activations, needed.call.inputs, strict=True) if n in needed.nodes)
            names |= {node: values[value] for node, value in read}
            found = translator.run(region.graph.graph, names, needed.nodes, region.name)
            made = zip(region.results(), needed.call.outputs, strict=True)
            values |= {value: found[node] for node, value in made if node in needed.nodes}
        builder.scope = ""

    def _take(self, builder: GraphBuilder, entry: Input) -> str:
        """Declare an input; one with a row for every token has (batch, sequence) rows outside, and one list inside."""
        dtype = self.compute if entry.dtype == COMPUTE_DTYPE else entry.dtype
        name = builder.take_input(entry.name, dtype, _shape(entry.shape))
        if TOKENS not in entry.shape:
            return name
        return builder.reshape(
            name, [-1 if size == TOKENS else _kept(builder, name, entry, axis) for axis, size in enumerate(entry.shape)]
        )

    def _last(self, builder: GraphBuilder, hidden: str, batch: str, width: int) -> str:
        """Slice the hidden states of tokens that get logits: the last ones of every row, or all."""
        rows = builder.reshape(hidden, [batch, -1, width])
        start = builder.op("Unsqueeze", builder.op("Neg", KEEP), builder.constant([0]))
        last = builder.op("Slice", rows, start, builder.constant([2**63 - 1]), builder.constant([1]))
        return builder.reshape(last, [1, -1, width])

    def _give(self, builder: GraphBuilder, name: str, value: str, shape: Sequence[int | str]) -> None:
        builder.give_output(name, value, self.compute, shape)

    def _result_shape(self, variant: Variant, name: str) -> list[int | str]:
        """Return a computed value's shape; sizes that change are named by their axis."""
        call = next(call for call in variant.calls if name in call.outputs)
        node = self.program.regions[call.region].results()[call.outputs.index(name)]
        shape = enumerate(node.meta["val"].shape)
        return [size if isinstance(size, int) else f"features_{axis}" for axis, size in shape]

    def parts(self) -> int:
        """Count the values of an embedding's width that clients pass for every token."""
        return (
            1 if STEP in self.program.variants else len(embedded_tokens(self.program, self.program.variants["image"]))
        )

    def columns(self) -> int:
        """Return the width of features and embeddings as clients pass them."""
        return self._width() * self.parts() + self.marked

    def _width(self) -> int:
        """Return the width of the token embeddings."""
        return next(slot.shape[1] for _, slot in self.program.slots() if slot.role == "embedding")


def _kept(builder: GraphBuilder, name: str, entry: Input, axis: int) -> int | str:
    """Return a size other than that of tokens, which clients see as two dimensions."""
    size = entry.shape[axis]
    if isinstance(size, int):
        return size
    return builder.size(name, len(_shape(entry.shape[:axis])))


def _shape(sizes: Sequence[Size]) -> list[int | str]:
    """Return an input's shape for clients, where the tokens of all rows are (batch, sequence)."""
    shape: list[int | str] = []
    for size in sizes:
        if size == TOKENS:
            if shape and shape[-1] == 1:
                shape.pop()
            shape += ["batch_size", "sequence_length"]
        else:
            shape.append(size if isinstance(size, int) else _NAMES.get(size, str(size).replace("*", "_times_")))
    return shape
