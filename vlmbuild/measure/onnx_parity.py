"""Hold an artifact's ONNX models against its program: the same batches through both, in a process of their own.

`python -m vlmbuild.measure.onnx_parity DIRECTORY DTYPE` prints the records as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vlmbuild.families import family_named
from vlmbuild.ir.program import Variant
from vlmbuild.ir.serialize import PROGRAM_FILE, from_json
from vlmbuild.kv_cache.program import CROSS, present_name, with_cache
from vlmbuild.measure.batches import SEED, Case, cases
from vlmbuild.measure.numerics import Measurement, Record, compare, print_records, stepwise
from vlmbuild.measure.reference import Reference
from vlmbuild.quant.ort_matmul import INTEGER
from vlmbuild.runtime.onnx.decoding import FEATURES, OnnxDecoding, OnnxModels
from vlmbuild.runtime.onnx.model import OnnxVisionLanguageModel
from vlmbuild.runtime.onnx.weights import OnnxWeights

TOLERANCES = {"float32": 1e-4, "float16": 2e-2}
"""The relative error of each output up to which models are published, by compute dtype; both multiply by the same weights.
In float32 only sums in another order differ; in float16 activations are rounded to 11 bits, some hundred times in a row."""
ROUNDED_INPUTS = 1e-1
"""The same where inputs are rounded to 8 bits in blocks: 0.2 to 0.9 % of each product, and what later layers make of it."""


def onnx_measurement(directory: Path, dtype: str) -> Measurement:
    """Start measuring an artifact's models in another process."""
    return Measurement(__name__, directory, dtype, "The ONNX models")


def measure(directory: Path, dtype: str) -> list[Record]:
    """Measure an artifact's models in this process, and return the manifest's records without judging them."""
    program = from_json(json.loads((directory / PROGRAM_FILE).read_text(encoding="utf-8")))
    family = family_named(program.family)
    config = family.config(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    processor = family.processor(directory)
    weights = OnnxWeights(directory)
    reference = Reference(with_cache(program), family, config, weights)
    # Kernels of packed weights depend on how they are laid out, and are checked as they will run.
    models = OnnxModels.open(directory, economical=weights.stems - weights.packing)
    model = OnnxVisionLanguageModel(models, family, config, processor, directory)
    records = []
    for case in cases(processor):
        records += _compare(case, model, reference)
    rounds = any(weight.attributes.get("accuracy_level") == INTEGER for weight in weights.packed.values())
    tolerance = max(TOLERANCES[dtype], ROUNDED_INPUTS if rounds else 0)
    return [{**record, "dtype": dtype, "seed": SEED, "tolerance": f"{tolerance:.0e}"} for record in records]


def _compare(case: Case, model: OnnxVisionLanguageModel, reference: Reference) -> list[Record]:
    """Compare a prompt and some tokens on its cache with the program, which computes all at once."""
    cache = model.new_cache()
    decoding = OnnxDecoding(model, cache)
    batch, logits = stepwise(case, decoding, model.family)
    expected = _expected(batch, reference)
    found = {"logits": logits, **decoding.image_values(case.batch)}
    if FEATURES in found:  # a mark of image tokens may follow
        found[FEATURES] = found[FEATURES][..., : expected[FEATURES].shape[-1]]
    found |= {present_name(name): x for name, x in cache.past(1, torch.float32, torch.device("cpu")).items()}
    return compare(case.name, batch, found, expected)


def _expected(batch: Mapping[str, Tensor], reference: Reference) -> dict[str, Tensor]:
    """Run the program; return what clients see: logits, the cache, and values that follow from images."""
    name, values = reference.run(batch, Variant.image_values)
    variant = reference.program.variants[name]
    names = {variant.output: "logits"}
    names |= {value: FEATURES for value in variant.image_values() if not value.startswith(CROSS)}
    return {names.get(value, value): tensor for value, tensor in values.items()}


if __name__ == "__main__":
    sys.exit(print_records(lambda: partial(measure, Path(sys.argv[1]), *sys.argv[2:])))
