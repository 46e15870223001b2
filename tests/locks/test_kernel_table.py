"""Kernels compiled for GPUs that are not here: figures, spills, tensor cores, and the reason where Triton is missing."""

from __future__ import annotations

import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import tiny
import torch

from vlmbuild.locks.document import Kernels
from vlmbuild.locks.kernel_compile import compile_launch
from vlmbuild.locks.kernel_difference import THRESHOLD, kernel_findings
from vlmbuild.locks.kernel_table import TARGETS, kernel_table, launches

ATTENTION = ("forward_kernel", "grad_query_kernel", "grad_key_kernel")
triton = pytest.importorskip("triton", reason="triton is Linux only")


@pytest.fixture(scope="module")
def triton_program(pristine_program):
    """Without the tower, whose kernels are those of the text in other sizes."""
    program = tiny.build(pristine_program, attention="triton")
    del program.regions["visual.blocks"]
    return program


@pytest.fixture(scope="module")
def table(triton_program):
    return kernel_table(triton_program, torch.bfloat16)


def test_every_kernel_is_compiled_for_every_target(table):
    names = {label.split()[0] for label in table.table}
    assert names == {*ATTENTION, "rotate_kernel", "cross_entropy_kernel"}
    for label, kernel in table.table.items():
        assert set(kernel.targets) == {f"sm_{target}" for target in TARGETS}
        for row in kernel.targets.values():
            assert 8 <= row["registers"] <= 255
            assert row["cubin"] > 1000
            assert row["spilled"] == 0
            assert (row["tensor_core"] != "none") == label.startswith(ATTENTION)
    forward = next(kernel for label, kernel in table.table.items() if "RANGED CAUSAL" in label)
    assert [forward.targets[f"sm_{target}"]["tensor_core"] for target in TARGETS] == ["mma", "wgmma", "tcgen05"]
    assert forward.regions == ("language_model.layers",)


def test_generation_launches_attention_with_a_mask(table):
    """A prompt's attention has a mask in the place of segments, and no backward."""
    masked = [label for label, kernel in table.table.items() if "MASKED" in label]
    assert [label.split()[0] for label in masked] == ["forward_kernel"]
    assert "RANGED" not in masked[0]
    assert table.table[masked[0]].regions == ("language_model.layers",)


def test_sdpa_launches_no_attention_kernel(pristine_program):
    program = tiny.build(pristine_program, attention="sdpa")
    names = {launch.kernel.__name__.strip("_") for *_, launch in launches(program, torch.bfloat16, (90,))}
    assert names == {"rotate_kernel", "cross_entropy_kernel"}


def test_kernels_are_compiled_once(table):
    """Had one been compiled for strides or sizes, there would be a second one with the same constants."""
    assert not [label for label in table.table if "#" in label]


def test_a_kernel_that_has_too_few_registers_spills(triton_program, table):
    launch = next(
        found for *_, found in launches(triton_program, torch.bfloat16, (80,)) if "forward" in found.kernel.__name__
    )
    row = compile_launch(launch._replace(tile=launch.tile | {"maxnreg": 64}), 80)
    assert row["spilled"] > 0
    label = next(label for label in table.table if label.startswith("forward"))
    kernel = table.table[label]
    spilled = replace(kernel, targets=kernel.targets | {"sm_80": row})
    findings, _ = kernel_findings(table, Kernels(table=table.table | {label: spilled}))
    assert ("cost", label, f"spills 0 → {row['spilled']} bytes of a thread's registers on sm_80") in findings


@pytest.mark.parametrize(
    ("change", "severity", "words"),
    [
        ({"tensor_core": "mma"}, "cost", "loses its tensor-core path on sm_90: wgmma → mma"),
        ({"registers": 1.5}, "cost", "registers of a thread on sm_90"),
        ({"registers": 1 + THRESHOLD / 2}, "cosmetic", "registers of a thread on sm_90"),
        ({"cubin": 0.5}, "cosmetic", "bytes of code on sm_90"),
    ],
)
def test_thresholds(table, change, severity, words):
    label = next(label for label in table.table if label.startswith("forward"))
    kernel = table.table[label]
    row = dict(kernel.targets["sm_90"])
    for name, value in change.items():
        row[name] = value if isinstance(value, str) else int(row[name] * value)
    new = Kernels(table=table.table | {label: replace(kernel, targets=kernel.targets | {"sm_90": row})})
    ((found, place, text),), notes = kernel_findings(table, new)
    assert (found, place, notes) == (severity, label, [])
    assert words in text


def test_a_kernel_with_other_tiles_is_compared_with_the_one_that_it_replaces(table):
    label = next(label for label in table.table if label.startswith("forward"))
    kernel = table.table[label]
    row = kernel.targets["sm_90"] | {"tensor_core": "mma", "registers": 255}
    others = {name: entry for name, entry in table.table.items() if name != label}
    new = Kernels(table=others | {f"{label} ROWS=7": replace(kernel, targets=kernel.targets | {"sm_90": row})})
    findings, _ = kernel_findings(table, new)
    assert ("cosmetic", f"{label} ROWS=7", f"takes the place of {label}") in findings
    assert ("cost", f"{label} ROWS=7", "loses its tensor-core path on sm_90: wgmma → mma") in findings
    assert all(place == f"{label} ROWS=7" for _, place, _ in findings)


def test_a_target_that_is_gone_is_found(table):
    label = next(iter(table.table))
    rows = {target: row for target, row in table.table[label].targets.items() if target != "sm_80"}
    new = Kernels(table=table.table | {label: replace(table.table[label], targets=rows)})
    assert kernel_findings(table, new)[0] == [("cost", label, "sm_80 is in one of the tables alone")]


def test_kernels_are_compiled_in_threads_whenever_these_change_places(pristine_built, monkeypatch):
    """CPython gives way to other threads while it parses only when it collects garbage, so here it often does."""
    import triton

    launch = next(
        launch for _, _, launch in launches(pristine_built, torch.bfloat16, (90,)) if "rotate" in launch.kernel.__name__
    )
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    give_way = lambda *_: time.sleep(1e-5)  # noqa: E731
    before = gc.get_threshold()
    gc.callbacks.append(give_way)
    gc.set_threshold(30)
    try:
        with ThreadPoolExecutor(4) as pool:
            rows = list(pool.map(lambda target: compile_launch(launch, target), (80, 90) * 8))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(give_way)
    assert rows[0] == rows[2]


def test_without_triton_the_table_says_why(pristine_built, monkeypatch):
    monkeypatch.setitem(sys.modules, "vlmbuild.ops.triton_util", None)
    kernels = kernel_table(pristine_built, torch.bfloat16)
    assert kernels == Kernels("triton is not installed")
    assert kernel_findings(kernels, Kernels()) == (
        [],
        ["Kernels were not compared: the old lock has no table, since: triton is not installed."],
    )
