"""Golden cases as files of an artifact, under `golden/`: JSON, PNG and safetensors, nothing that runs."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import IncompatibleError
from vlmbuild.golden.cases import GoldenCase, png
from vlmbuild.golden.record import GoldenRecord
from vlmbuild.golden.sample import Sample

CASES, VALUES = "golden/cases.json", "golden/values.safetensors"
_SCHEMA = "vlmbuild.golden/1"


def write_golden(writer: ArtifactWriter, records: Sequence[GoldenRecord]) -> None:
    """Write golden cases into an artifact that is being built. Raises OutputError."""
    for path, data in golden_files(records).items():
        writer.write(path, data, "data")


def golden_files(records: Sequence[GoldenRecord]) -> dict[str, bytes]:
    """Return the files of golden cases by path."""
    files: dict[str, bytes] = {}
    values: dict[str, Any] = {}
    cases = []
    for number, record in enumerate(records):
        for index, image in enumerate(record.case.images):
            files[f"golden/{number}-{index}.png"] = png(image)
        for stage, sample in record.samples.items():
            values[f"{number}/{stage}"] = sample.values
            values[f"{number}/{stage}/total"] = np.array([sample.norm, sample.mean], np.float64)
        cases.append(_case(record))
    files[CASES] = canonical_json({"schema": _SCHEMA, "cases": cases})
    files[VALUES] = safetensors.numpy.save(dict(sorted(values.items())))
    return files


def read_golden(read: Callable[[str], bytes]) -> list[GoldenRecord]:
    """Read golden cases from an artifact's files. Raises IncompatibleError for another version."""
    document = json.loads(read(CASES))
    if document.get("schema") != _SCHEMA:
        raise IncompatibleError(
            f"{CASES} has the schema {document.get('schema')!r}; this vlmbuild reads {_SCHEMA}. Install a newer vlmbuild."
        )
    values = safetensors.numpy.load(read(VALUES))
    records = []
    for number, case in enumerate(document["cases"]):
        images = tuple(
            Image.open(io.BytesIO(read(f"golden/{number}-{index}.png"))).convert("RGB")
            for index in range(case["images"])
        )
        samples = {}
        for stage, (rows, columns) in case["shapes"].items():
            norm, mean = values[f"{number}/{stage}/total"].tolist()
            samples[stage] = Sample((rows, columns), values[f"{number}/{stage}"], norm, mean)
        records.append(
            GoldenRecord(
                GoldenCase(case["name"], tuple(case["messages"]), images),
                case["text"],
                case["tokens"],
                samples,
                {stage: (module, side) for stage, (module, side) in case["modules"].items()},
                case["greedy"],
                [float(margin) for margin in case["margins"]],
                {int(token): float(value) for token, value in case["top"].items()},
                case["template"],
            )
        )
    return records


def _case(record: GoldenRecord) -> dict[str, Any]:
    tokens = np.array(record.tokens, "<i8").tobytes()
    return {
        "name": record.case.name,
        "messages": list(record.case.messages),
        "images": len(record.case.images),
        "text": record.text,
        "template": record.template,
        "tokens": record.tokens,
        "sha256": hashlib.sha256(tokens).hexdigest(),
        "shapes": {stage: list(sample.shape) for stage, sample in record.samples.items()},
        "modules": {stage: list(module) for stage, module in record.modules.items()},
        "greedy": record.greedy,
        "margins": [f"{margin:.3e}" for margin in record.margins],
        "top": {str(token): f"{value:.6f}" for token, value in record.top.items()},
    }
