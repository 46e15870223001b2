"""Hold an artifact's compiled code against its graphs: the same batches through both, in a process of their own.

`python -m vlmbuild.runtime.code_numerics DIRECTORY DTYPE` prints the records as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlmbuild.runtime.compiled_code import adopt_code
from vlmbuild.runtime.decoding import Decoding
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.loader import bind_directory
from vlmbuild.runtime.model import VisionLanguageModel
from vlmbuild.runtime.numerics import PRESENT, STEPS, Record, compare, measure_apart, print_records, stepwise
from vlmbuild.runtime.probe import SEED, Case, cases

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
"""The relative error of each output up to which code is published, by compute dtype. Both multiply by the same weights; fused
kernels round less often than graphs do."""
_WHAT = "The compiled regions"


def measure_code_apart(directory: Path, dtype: str, progress: Callable[[str, int, int], None]) -> list[Record]:
    """The manifest's records about an artifact's code, measured in another process: what crashes ends that one.

    Raises:
        ParityError: A region does not run, or computes something else than its graph.
    """
    return measure_apart(__name__, [str(directory), dtype], _WHAT, progress)


@torch.no_grad()
def measure(directory: Path, dtype: str) -> list[Record]:
    """As `measure_code_apart`, in this process and without judging."""

    def read(name: str) -> bytes:
        return (directory / name).read_bytes()

    graphs, compiled = (bind_directory(directory, getattr(torch, dtype)).eval() for _ in range(2))
    adopt_code(compiled, read, str(directory))
    records: list[Record] = []
    for case in cases(graphs.family.processor(directory)):
        for form in ("growing", "static"):
            records += _compare(case, form, graphs, compiled)
    return [{**record, "dtype": dtype, "seed": SEED, "tolerance": f"{TOLERANCES[dtype]:.0e}"} for record in records]


def _compare(case: Case, form: str, graphs: VisionLanguageModel, compiled: VisionLanguageModel) -> list[Record]:
    """A prompt, then some tokens on its cache, against the graphs with all of that at once."""
    length = case.batch["input_ids"].shape[1] + STEPS
    cache = compiled.new_cache(length if form == "static" else None)
    batch, logits = stepwise(case, Decoding(compiled, cache), compiled.family)
    whole = graphs.new_cache()
    expected = {"logits": Decoding(graphs, whole).logits(batch)} | _held(whole, compiled, batch)
    found = {"logits": logits} | _held(cache, compiled, batch)
    return compare(f"{case.name}, {form} cache", batch, found, expected)


def _held(cache: KeyValueCache, model: VisionLanguageModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows, tokens = batch["attention_mask"].shape
    held = cache.past(rows, model.dtype, model.device)
    return {name.replace("past_key_values.", PRESENT, 1): x[:, :, :tokens] for name, x in held.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)  # figures go into the manifest, and are not to depend on the number of cores
    sys.exit(print_records(lambda: measure(Path(sys.argv[1]), *sys.argv[2:])))
