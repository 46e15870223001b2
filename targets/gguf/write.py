"""Write a GGUF artifact: `model.gguf`, `mmproj.gguf`, a Modelfile for Ollama, and the files that comparisons need."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.paths import GENERATION_CONFIG
from vlmbuild.artifact.safetensors import tensor_bytes
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.ir.printer import program_text
from vlmbuild.ir.program import join
from vlmbuild.ir.schema import TENSORS_FILE
from vlmbuild.ir.serialize import PROGRAM_FILE, to_json
from vlmbuild.quant.gguf import GgufFormat, gguf_package
from vlmbuild.runtime.gguf.layout import FILES, MODEL, TOWER, gguf_tensors
from vlmbuild.targets.gguf.header import Stored, constant, general_values, header, padding, stored
from vlmbuild.targets.gguf.side_files import MODELFILE, engine_files
from vlmbuild.targets.gguf.tokenizer import tokenizer_values
from vlmbuild.targets.golden import record_golden
from vlmbuild.targets.records import artifact_config, publish
from vlmbuild.targets.request import Request
from vlmbuild.targets.trainable import format_names
from vlmbuild.targets.weights import RelativeError, parameter_values
from vlmbuild.util.validation import cast_finite

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CONFIG_FILES = ("config.json", GENERATION_CONFIG, MODELFILE)


@contextmanager
def writing() -> Iterator[Callable[[ArtifactWriter, Request], Manifest]]:
    """Return the function that writes. Raises IncompatibleError without the package, before the model is captured."""
    gguf_package()
    yield write


def write(writer: ArtifactWriter, request: Request) -> Manifest:
    """Write and publish a GGUF artifact; weights pass through memory in chunks.

    Raises:
        SourceError: llama.cpp would compute something else, or a tensor cannot be read or quantized.
        ParityError: The merged weights differ from source plus adapter, or lose more than rounding explains.
        OutputError: There is no space, or the output cannot be written.
    """
    plan = _plan(request)
    writer.require_space(plan.size)
    for name, data in plan.files.items():
        writer.write(name, data, "config" if name in _CONFIG_FILES else "processor")
    writer.write(PROGRAM_FILE, canonical_json(to_json(request.program)), "graph")
    writer.write("graph/program.txt", program_text(request.program).encode(), "graph")
    writer.write(TENSORS_FILE, canonical_json(plan.places()), "graph")
    output = _Output(writer, request, sum(each.nbytes for tensors in plan.tensors.values() for each in tensors))
    for file in FILES:
        output.write_file(file, plan.heads[file], plan.tensors[file])
    decisions = {
        module: replace(decision, error=output.error(f"{module}.weight") if decision.format else decision.error)
        for module, decision in request.decisions.items()
    }
    return publish(
        writer,
        replace(request, decisions=decisions),
        formats=format_names(request.program),
        toolchain={"gguf": importlib.metadata.version("gguf")},
        numerics=[*request.measure(writer.staging), *record_golden(writer, request, always=True, measured=decisions)],
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that is known before a weight is read.

    Attributes:
        files: Files that hold no weights.
        tensors: GGUF file -> its tensors.
        heads: GGUF file -> what comes before them.
    """

    files: Mapping[str, bytes]
    tensors: Mapping[str, Sequence[Stored]]
    heads: Mapping[str, bytes]

    def places(self) -> dict[str, list[list[Any]]]:
        """Return the tensors that each parameter has become: parameter -> [file, name, bytes] of each."""
        found: dict[str, list[list[Any]]] = {}
        for each in (each for file in FILES for each in self.tensors[file] if not each.constant):
            found.setdefault(each.tensor.parameter, []).append([each.tensor.file, each.tensor.name, each.nbytes])
        return found

    @property
    def size(self) -> int:
        """Bytes of the artifact, without its manifest and graph."""
        plain = sum(map(len, [*self.files.values(), *self.heads.values()]))
        return plain + sum(each.nbytes + padding(each.nbytes) for file in FILES for each in self.tensors[file])


def _plan(request: Request) -> _Plan:
    config, processor, family = request.checkpoint.config, request.checkpoint.processor, request.family
    model, images = family.gguf_model(config, processor), family.gguf_images(config, processor)
    formats = _formats(request)
    tensors: dict[str, list[Stored]] = {file: [] for file in FILES}
    for tensor in gguf_tensors(request.program.source_weights(), family, model):
        form = None if tensor.part.copied else formats.get(tensor.parameter)
        tensors[tensor.file].append(stored(tensor, request.recipe.dtype, form))
    if model.rope_factors:
        tensors[MODEL].append(constant("ROPE_FREQS", model.rope_factors))
    files, dtype = request.side_files(), request.recipe.dtype
    template = processor.chat_template if isinstance(processor.chat_template, str) else None
    tokens = tokenizer_values(files, processor.tokenizer, family.vocabulary(config), template)
    general = {
        MODEL: general_values(tensors[MODEL], dtype, "model", family.title),
        TOWER: general_values(tensors[TOWER], dtype, "mmproj", family.title),
    }
    projector = {"clip_projector_type": getattr(gguf_package().VisionProjectorType, model.projector)}
    heads = {
        MODEL: header(model.arch, {**general[MODEL], **model.text, **tokens}, tensors[MODEL]),
        TOWER: header("MMPROJ", {**general[TOWER], **projector, **model.vision, **images.values}, tensors[TOWER]),
    }
    written = artifact_config(request.checkpoint.values, request.recipe)
    first = int(config.image_token_id)
    media = [first, *sorted(family.media_tokens(processor) - {first})]
    described = {"config.json": (json.dumps(written, indent=2, sort_keys=True) + "\n").encode()}
    return _Plan({**files, **described, **engine_files(model, images, processor.tokenizer, media)}, tensors, heads)


def _formats(request: Request) -> dict[str, GgufFormat]:
    """Map module names of quantized parameters to their formats."""
    return {
        join(instance, recipe.source): recipe.format
        for region in request.program.regions.values()
        for instance in region.instances
        for recipe in region.recipes
        if isinstance(recipe.format, GgufFormat)
    }


@dataclass(slots=True)
class _Output:
    """Writes files of tensors, one after another.

    Attributes:
        total: Bytes of all tensors.
        done: Bytes that are written.
        errors: Parameter -> its rounding error.
    """

    writer: ArtifactWriter
    request: Request
    total: int
    done: int = 0
    errors: dict[str, RelativeError] = field(default_factory=dict)

    def write_file(self, file: str, head: bytes, tensors: Sequence[Stored]) -> None:
        """Write one file. Raises SourceError, OutputError."""
        with self.writer.open(file, "weights") as output:
            output.write(head)
            for each in tensors:
                size = 0
                for data in self._chunks(each):
                    output.write(data)
                    size += len(data)
                assert size == each.nbytes, each.tensor.name
                output.write(bytes(padding(size)))
                self.done += size
                self.request.progress("weights", self.done, self.total)

    def error(self, parameter: str) -> float | None:
        """Return the relative error of rounding a parameter; None if it was not rounded. Raises ParityError."""
        return self.errors[parameter].value if parameter in self.errors else None

    def _chunks(self, each: Stored) -> Iterator[bytes]:
        if each.constant:
            yield bytes(tensor_bytes(torch.tensor(each.constant, dtype=torch.float32)))
            return
        tensor, name = each.tensor, self.request.tensors[each.tensor.parameter].name
        first = 0
        for chunk in parameter_values(self.request, tensor.parameter, torch.float32, tensor.chunk_unit):
            rows = chunk.float().view(-1, *tensor.source_shape[1:])
            values = tensor.cut(rows, first).contiguous()
            first += len(rows)
            if not len(values):
                continue
            if each.form is None:
                yield bytes(tensor_bytes(cast_finite(values, _DTYPES[each.type.name], name, self.request.dtypes)))
            else:
                packed = each.form.pack(values, name)
                self.errors.setdefault(tensor.parameter, RelativeError(name)).add(values, each.form.unpack(packed))
                yield packed.tobytes()
