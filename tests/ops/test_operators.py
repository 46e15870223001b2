"""The table of operators: complete, derived sets, and nothing forgotten by locks or targets."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest
import torch

import vlmbuild.ops
from vlmbuild.ir import serialize
from vlmbuild.ops import ATTENTION, LINEAR, OPERATORS
from vlmbuild.targets.aoti import lowering
from vlmbuild.targets.onnx import operators as onnx

OPS = torch.ops.vlmbuild
IN_PROGRAMS = {name for name, row in OPERATORS.items() if row.in_programs and row.part == "whole"}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def calls():
    """Arguments for each operator with kernels, one call for every kind of mask."""
    query, key = (meta(1, heads, 1009, 128) for heads in (12, 2))
    masks = [
        (None, None, None, None, True),
        (None, meta(7, dtype=torch.int32), None, None, True),
        (None, None, meta(1009, dtype=torch.int32), meta(1009, 5, dtype=torch.bool), False),
    ]
    attention = [(query, key, key, *mask, 0.1) for mask in masks]
    angle = meta(1, 1009, 64, dtype=torch.float32)
    return {
        "attention_auto": attention,
        "attention_triton": attention,
        "mrope_rotate": [(query, key, angle, angle)],
        "cross_entropy": [(meta(5, 70), meta(5, dtype=torch.int64))],
    }


def kernels_of_the_package():
    """List the Triton functions that are launched, in all modules of operators."""
    from triton.runtime.jit import JITFunction

    modules = [import_module(found.name) for found in pkgutil.walk_packages(vlmbuild.ops.__path__, "vlmbuild.ops.")]
    functions = {item.__name__ for module in modules for item in vars(module).values() if isinstance(item, JITFunction)}
    return {name for name in functions if name.endswith("_kernel")}


def test_every_registered_operator_has_a_row():
    registered = {
        name.removeprefix("vlmbuild::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vlmbuild::")
    }
    # `repeat` marks blocks while a model is captured; no program contains it.
    assert registered - {"repeat"} == set(OPERATORS) - {"cross_entropy"}
    assert all(row.name == name for name, row in OPERATORS.items())


def test_sets():
    assert {
        OPS.attention.default,
        OPS.attention_auto.default,
        OPS.attention_sdpa.default,
        OPS.attention_triton.default,
    } == (ATTENTION)
    assert {torch.ops.aten.linear.default, OPS.linear_4bit.default, OPS.linear_8bit.default} == LINEAR


def test_programs_call_what_the_rows_allow():
    allowed = {name for name in serialize.OPERATORS if name.startswith("vlmbuild.")}
    assert allowed == {f"vlmbuild.{name}.default" for name, row in OPERATORS.items() if row.in_programs}
    assert "vlmbuild.linear_onednn.default" not in allowed


@pytest.mark.parametrize("target", [onnx, lowering], ids=["onnx", "aoti"])
def test_each_target_has_a_form_or_a_refusal_for_each_operator(target):
    assert set(target.FORMS) == IN_PROGRAMS


def test_no_kernel_is_missing_from_locks():
    """Each kernel of the package is among the launches of some row, and locks take launches from rows alone."""
    pytest.importorskip("triton", reason="triton is Linux only")
    arguments = calls()
    assert set(arguments) == {name for name, row in OPERATORS.items() if row.kernels is not None}
    launched = {
        launch.kernel.__name__
        for name, of_operator in arguments.items()
        for call in of_operator
        for launch in OPERATORS[name].launches(call, 90)
    }
    assert launched == kernels_of_the_package()


def test_operators_without_kernels_launch_none():
    assert OPERATORS["lora"].launches((), 90) == ()
