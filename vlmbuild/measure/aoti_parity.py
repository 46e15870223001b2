"""Hold an artifact's compiled code against its graphs: the same batches through both, in a process of their own.

`python -m vlmbuild.measure.aoti_parity DIRECTORY DTYPE` prints the records as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from vlmbuild.kv_cache.block import FORMS, CacheForm
from vlmbuild.kv_cache.program import MASK, present_name
from vlmbuild.measure.batches import SEED, Case, cases
from vlmbuild.measure.numerics import STEPS, Measurement, Record, compare, print_records, stepwise
from vlmbuild.runtime.aoti.code import adopt_code, new_code_cache
from vlmbuild.runtime.bind import bind_directory
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.torch.decoding import Decoding
from vlmbuild.runtime.torch.model import VisionLanguageModel

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
"""The relative error of each output up to which code is published, by compute dtype. Both multiply by the same weights; fused
kernels round less often than graphs do."""


def code_measurement(directory: Path, dtype: str) -> Measurement:
    """Start measuring an artifact's code in another process, which a crash ends; weights and graphs must be written."""
    return Measurement(__name__, directory, dtype, "The compiled regions")


def measure(directory: Path, dtype: str) -> list[Record]:
    """Measure an artifact's code in this process, and return the manifest's records without judging them."""
    return prepare(directory, dtype)()


def prepare(directory: Path, dtype: str) -> Callable[[], list[Record]]:
    """Load all that needs no code, and return the function that measures the code."""
    graphs, compiled = (bind_directory(directory, getattr(torch, dtype)).eval() for _ in range(2))
    for model, form in ((graphs, "dynamic"), *((compiled, form) for form in FORMS)):
        model.cached(form)
    batches = tuple(cases(graphs.family.processor(directory)))

    @torch.no_grad()
    def records() -> list[Record]:
        adopt_code(compiled, lambda name: (directory / name).read_bytes(), str(directory))
        found = [
            record
            for case, form in zip(batches, cycle(FORMS), strict=False)
            for record in _compare(case, form, graphs, compiled)
        ]
        return [{**record, "dtype": dtype, "seed": SEED, "tolerance": f"{TOLERANCES[dtype]:.0e}"} for record in found]

    return records


def _compare(case: Case, form: CacheForm, graphs: VisionLanguageModel, compiled: VisionLanguageModel) -> list[Record]:
    """Compare code and graphs on a prompt, then tokens on its cache one at a time, then these tokens at once.

    Both forms of a cache run the same code.
    """
    whole = graphs.new_cache()
    cache = new_code_cache(compiled, case.batch["input_ids"].shape[1] + STEPS if form == "static" else None)
    decoding = Decoding(compiled, cache)
    batch, logits = stepwise(case, decoding, compiled.family)
    expected = {"logits": Decoding(graphs, whole).logits(batch)} | _held(whole, compiled, batch)
    found = {"logits": logits} | _held(cache, compiled, batch)
    records = compare(f"{case.name}, {form} cache", batch, found, expected)
    cache.crop(-STEPS)
    tokens = {"input_ids": batch["input_ids"][:, -STEPS:], MASK: batch[MASK]}
    found = {"logits": torch.cat([logits[:, :-STEPS], decoding.logits(tokens)], 1)} | _held(cache, compiled, batch)
    return records + compare(f"{case.name}, {form} cache, tokens at once", batch, found, expected)


def _held(cache: KeyValueCache, model: VisionLanguageModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows, tokens = batch[MASK].shape
    held = cache.past(rows, model.dtype, model.device)
    return {present_name(name): x[:, :, :tokens] for name, x in held.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)  # figures go into the manifest, and are not to depend on the number of cores
    sys.exit(print_records(lambda: prepare(Path(sys.argv[1]), *sys.argv[2:])))
