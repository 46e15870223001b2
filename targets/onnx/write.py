"""The ONNX target: models for ONNX Runtime and transformers.js, checked against the program before they are
published."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.paths import GENERATION_CONFIG
from vlmbuild.artifact.weights_writer import TensorSpec
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import SourceError
from vlmbuild.families import Family
from vlmbuild.ir.printer import program_text
from vlmbuild.ir.program import Program
from vlmbuild.ir.serialize import PROGRAM_FILE, to_json
from vlmbuild.kv_cache.program import with_cache
from vlmbuild.measure.onnx_parity import onnx_measurement
from vlmbuild.recipe import Recipe
from vlmbuild.runtime.onnx.decoding import Q4
from vlmbuild.runtime.onnx.session import FOLDER, onnx_runtime
from vlmbuild.targets.golden import record_golden
from vlmbuild.targets.onnx.data import write_data
from vlmbuild.targets.onnx.graph_builder import OLDEST_RUNTIME
from vlmbuild.targets.onnx.layout import Weights, packed_formats
from vlmbuild.targets.onnx.models import OnnxModel, onnx_models
from vlmbuild.targets.records import artifact_config, publish
from vlmbuild.targets.request import PlannedFile, Request, StoredParameter

_CLIENT_DTYPES = {"": "fp32", Q4: "q4"}
"""End of files' names -> transformers.js' dtype, which names files; without one a browser opens `*_quantized.onnx`."""


@contextmanager
def writing() -> Iterator[Callable[[ArtifactWriter, Request], Manifest]]:
    """Return the function that writes. Raises IncompatibleError without ONNX Runtime, before the model is captured."""
    onnx_runtime()
    yield write


def write(writer: ArtifactWriter, request: Request) -> Manifest:
    """Write and publish an ONNX artifact.

    Raises:
        SourceError: A tensor cannot be read or quantized.
        PassError: An operator has no translation.
        ParityError: A model computes something else than the program, or merged weights differ from source plus
            adapter.
        OutputError: There is no space, or the output cannot be written.
    """
    recipe, program = request.recipe, request.program
    formats = _format_names(program)
    suffix = _suffix(formats, recipe)
    models = _models(program, request.family, request.checkpoint.config, recipe)
    side_files = _side_files(request, suffix)
    writer.require_space(sum(_data_sizes(models).values()) + sum(len(data) for data in side_files.values()))
    for name, data in side_files.items():
        writer.write(name, data, "config" if name in ("config.json", GENERATION_CONFIG) else "processor")
    writer.write(PROGRAM_FILE, canonical_json(to_json(program)), "graph")
    writer.write("graph/program.txt", program_text(program).encode(), "graph")
    with onnx_measurement(writer.staging, recipe.dtype) as measurement:
        errors = _write_models(writer, models, request)
        numerics = [*measurement.records(request.progress), *request.measure(writer.staging)]
    numerics += record_golden(writer, request)
    decisions = {
        module: replace(decision, error=errors.get(f"{module}.weight", decision.error))
        for module, decision in request.decisions.items()
    }
    return publish(
        writer,
        replace(request, decisions=decisions),
        formats=formats,
        toolchain=_toolchain(),
        numerics=numerics,
    )


def planned_files(program: Program, family: Family, config: Any, recipe: Recipe) -> Iterator[PlannedFile]:
    """Yield the data files of a finished program, before any weight is read.

    Raises:
        PassError: An operator has no translation.
    """
    weights = {weight.name: weight for weight in program.source_weights()}
    files = {model.data.location: model.data for model in _models(program, family, config, recipe)}
    for location, data in files.items():
        parameters = []
        for name, places in data.parameters.items():
            specs = tuple(TensorSpec(name + suffix, place.dtype, place.shape) for suffix, place in places.items())
            parameters.append(StoredParameter(name, weights[name].shape, weights[name].format, specs))
        yield PlannedFile(f"{FOLDER}/{location}", data.size, tuple(parameters))


def _models(program: Program, family: Family, config: Any, recipe: Recipe) -> list[OnnxModel]:
    dtype = getattr(torch, recipe.dtype)
    weights = Weights(program, family.constants(config), dtype)
    suffix = _suffix(_format_names(program), recipe)
    return onnx_models(with_cache(program), weights, family.client_vision(config), dtype, suffix)


def _format_names(program: Program) -> list[str]:
    return [form.name for form, _ in packed_formats(program).values()]


def _suffix(formats: Sequence[str], recipe: Recipe) -> str:
    """Return the end of files' names, by which transformers.js finds them."""
    return Q4 if "int4" in formats and {"int4", "int8"}.issuperset(formats) and recipe.dtype == "float32" else ""


def _write_models(writer: ArtifactWriter, models: list[OnnxModel], request: Request) -> dict[str, float]:
    """Write graphs and their data files; returns the rounding error of each quantized parameter."""
    formats = {name: form for name, (form, _) in packed_formats(request.program).items()}
    errors: dict[str, float] = {}
    written: set[str] = set()
    total = sum(_data_sizes(models).values())
    done = 0

    def on_written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        request.progress("weights", done, total)

    for model in models:
        if model.data.location not in written:
            written.add(model.data.location)
            path = f"{FOLDER}/{model.data.location}"
            errors |= write_data(writer, path, model.data, formats, request, on_written)
        writer.write(f"{FOLDER}/{model.stem}.onnx", model.proto.SerializeToString(deterministic=True), "graph")
    return errors


def _toolchain() -> dict[str, str]:
    """Return versions of the tools that export, check and run; onnxruntime is installed under several names."""
    return {
        "onnx": importlib.metadata.version("onnx").partition("+")[0],
        "onnxruntime": onnx_runtime().__version__,
        "oldest onnxruntime": OLDEST_RUNTIME,
    }


def _data_sizes(models: list[OnnxModel]) -> dict[str, int]:
    return {model.data.location: model.data.size for model in models}


def _side_files(request: Request, suffix: str) -> dict[str, bytes]:
    """Return config.json, tokenizer and processor files, in the forms that clients read."""
    files = request.side_files()
    values = {name: _object(name, data) for name, data in files.items() if name.endswith("_config.json")}
    config = artifact_config(request.checkpoint.values, request.recipe)
    config["transformers.js_config"] = {"dtype": _CLIENT_DTYPES[suffix], "use_external_data_format": True}
    template = _template(files)
    client = request.family.client_files(config, values, template)
    if request.family.client_template_file and template:
        files = {**files, "chat_template.jinja": template.encode()}
    return files | {name: _json(content) for name, content in client.items()}


def _object(name: str, data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise SourceError(f"{name} of the checkpoint is not valid JSON: {error}. Repair it.") from error
    return found


def _template(files: Mapping[str, bytes]) -> str | None:
    """Return the chat template from the file beside tokenizer_config.json that has it."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    if "chat_template.json" in files:
        template = _object("chat_template.json", files["chat_template.json"]).get("chat_template")
        return template if isinstance(template, str) else None
    return None


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
