"""Hold an artifact's ONNX models against its program: the same batches through both, in a process of their own.

`python -m vlmbuild.measure.onnx_parity DIRECTORY DTYPE` prints the records as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.families import Family, family_named
from vlmbuild.ir import interpret
from vlmbuild.ir.program import Program, Region, Variant
from vlmbuild.ir.serialize import PROGRAM_FILE, from_json
from vlmbuild.kv_cache.program import CROSS, cached_inputs, present_name, with_cache
from vlmbuild.measure.batches import SEED, Case, cases
from vlmbuild.measure.numerics import Measurement, Record, compare, print_records, stepwise
from vlmbuild.quant.ort_matmul import INTEGER
from vlmbuild.runtime.decode_steps import unpack_to_padded, whole_mask
from vlmbuild.runtime.onnx.decoding import FEATURES, OnnxDecoding, OnnxModels
from vlmbuild.runtime.onnx.model import OnnxVisionLanguageModel
from vlmbuild.runtime.onnx.weights import OnnxWeights
from vlmbuild.runtime.torch.region import BoundRegion

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
    reference = _Reference(with_cache(program), family, config, weights)
    # Kernels of packed weights depend on how they are laid out, and are checked as they will run.
    models = OnnxModels.open(directory, economical=weights.stems - weights.packing)
    model = OnnxVisionLanguageModel(models, family, config, processor, directory)
    records = []
    for case in cases(processor):
        records += _compare(case, model, reference)
    rounds = any(weight.attributes.get("accuracy_level") == INTEGER for weight in weights.packed.values())
    tolerance = max(TOLERANCES[dtype], ROUNDED_INPUTS if rounds else 0)
    return [{**record, "dtype": dtype, "seed": SEED, "tolerance": f"{tolerance:.0e}"} for record in records]


class _Reference:
    """Runs the program in float32 with one block's weights in memory."""

    def __init__(self, program: Program, family: Family, config: Any, weights: OnnxWeights) -> None:
        self.program = program
        self._family, self._config, self._weights = family, config, weights
        self._constants = family.constants(config)
        self._bound = {name: BoundRegion(region, torch.float32, ()) for name, region in program.regions.items()}

    @torch.no_grad()
    def run(self, batch: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        """Run a batch; return its variant and the values that clients see.

        These are logits (batch, sequence, vocabulary), the cache, and values that follow from images.
        """
        prepared = self._family.prepare(batch, self._config)
        variant = self.program.variants[prepared.variant]
        shape = batch["input_ids"].shape
        values = unpack_to_padded(prepared, variant, shape)
        values = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in values.items()}
        values["attention_mask"] = whole_mask(batch.get("attention_mask"), shape[0], shape[1], torch.device("cpu"))
        for entry in cached_inputs(variant):
            values[entry.name] = torch.zeros(shape[0], entry.fixed_size(1), 0, entry.fixed_size(3))
        kept = self._seen(variant)
        results = interpret.run(self.program, variant, values, self._tensors_of, self._run_region, keep=kept.values())
        found = {name: results[value] for name, value in kept.items()}
        found["logits"] = found["logits"].view(*shape, -1)
        return prepared.variant, found

    def _tensors_of(self, region: Region, instance: str) -> tuple[Tensor, ...]:
        return self._weights.slots(region, instance, self._constants)

    def _run_region(
        self, region: Region, tensors: tuple[Tensor, ...], activations: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return self._bound[region.name].run(tensors, None, activations, training=False)

    def _seen(self, variant: Variant) -> dict[str, str]:
        """Map names that clients see to names in the variant."""
        images = variant.image_values()
        return {
            "logits": variant.output,
            **{name: name for name in variant.presents},
            **{value if value.startswith(CROSS) else FEATURES: value for value in images},
        }


def _compare(case: Case, model: OnnxVisionLanguageModel, reference: _Reference) -> list[Record]:
    """Compare a prompt and some tokens on its cache with the program, which computes all at once."""
    cache = model.new_cache()
    decoding = OnnxDecoding(model, cache)
    batch, logits = stepwise(case, decoding, model.family)
    _, expected = reference.run(batch)
    found = {"logits": logits, **decoding.image_values(case.batch)}
    if FEATURES in found:  # a mark of image tokens may follow
        found[FEATURES] = found[FEATURES][..., : expected[FEATURES].shape[-1]]
    found |= {present_name(name): x for name, x in cache.past(1, torch.float32, torch.device("cpu")).items()}
    return compare(case.name, batch, found, expected)


if __name__ == "__main__":
    sys.exit(print_records(lambda: partial(measure, Path(sys.argv[1]), *sys.argv[2:])))
