"""Stored programs of an attacker: refused when they are read, whatever they would take to run."""

from __future__ import annotations

import copy

import pytest
from tiny import make_region, region_program

from vlmbuild.errors import IncompatibleError
from vlmbuild.ir import check
from vlmbuild.ir.program import COMPUTE_DTYPE, Slot
from vlmbuild.ir.serialize import from_json, to_json

INPUT = {"node": 0}


def program(*nodes, results=None):
    """A program of one block, x [1, tokens, 8] -> the last of the nodes."""
    region = make_region("blocks", lambda x: (x + 1.0,), (), [("1", "tokens", 8)], ("blocks.0",))
    values = copy.deepcopy(to_json(region_program(region)))
    values["regions"][0] |= {"nodes": list(nodes), "results": results or [{"node": len(nodes)}]}
    call = {"region": "blocks", "instance": "blocks.0", "inputs": ["x"], "outputs": ["y"]}
    inputs = [{"name": "x", "dtype": "compute", "shape": [1, "tokens", 8]}]
    values["variants"] = {"text": {"inputs": inputs, "calls": [call], "output": "y"}}
    return values


def node(op, *args, **kwargs):
    return {"op": f"aten.{op}", "args": list(args)} | ({"kwargs": kwargs} if kwargs else {})


def doubled(times):
    return [node("cat.default", [{"node": index}, {"node": index}], 1) for index in range(times)]


def squared(times):
    flat = [node("reshape.default", INPUT, [-1])]
    for index in range(times):
        at = {"node": 1 + 3 * index}
        flat += [node("unsqueeze.default", at, 1), node("mul.Tensor", {"node": 2 + 3 * index}, at)]
        flat += [node("reshape.default", {"node": 3 + 3 * index}, [-1])]
    return flat


@pytest.mark.parametrize(
    "nodes",
    [
        doubled(60),
        squared(6),
        [node("new_zeros.default", INPUT, [2**40])],
        [node("expand.default", INPUT, [2**40, -1, -1])],
        [node("stack.default", [INPUT] * 9000), node("sub.Tensor", {"node": 1}, 1.0)],
    ],
    ids=["doubled", "squared", "zeros", "expanded", "stacked"],
)
def test_values_that_grow_are_refused_unseen(nodes):
    with pytest.raises(IncompatibleError, match="blocks .*take more memory"):
        from_json(program(*nodes))


def test_a_list_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(check, "_LONGEST_LIST", 7)
    with pytest.raises(IncompatibleError, match=r"more than 7 tensors in blocks"):
        from_json(program(node("unbind.int", INPUT, 2), results=[INPUT]))


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "argument",
    [deep(150), deep(900), 10**400, -(2**70), "\ud800", "a", None, [None], {"float": "nan"}, {"dtype": "bool"}, []],
    ids=lambda value: ascii(value)[:20],
)
def test_an_argument_that_no_operator_takes_is_refused(argument):
    """fx writes arguments into the code of a graph; lists in lists end its compiler with a SyntaxError."""
    with pytest.raises(IncompatibleError):
        from_json(program(node("reshape.default", INPUT, argument)))


@pytest.mark.parametrize(
    "nodes",
    [[node("linear.default", INPUT)], [node("add.Tensor", INPUT, INPUT, INPUT, INPUT)], [node("cat.default", INPUT)]],
    ids=["too few", "too many", "another kind"],
)
def test_operators_get_what_they_take(nodes):
    with pytest.raises(IncompatibleError, match="cannot run"):
        from_json(program(*nodes))


@pytest.mark.parametrize("what", check.LARGEST)
def test_more_parts_than_any_model_has_are_not_read(what, monkeypatch):
    monkeypatch.setitem(check.LARGEST, what, 0)
    with pytest.raises(IncompatibleError, match=f"has 1 {what}, and at most 0"):
        from_json(program(node("neg.default", INPUT)))


def repeated(values, times):
    """Let the last call of a program run again on its own result."""
    (variant,) = values["variants"].values()
    call = variant["calls"][-1]
    variant["calls"] += [call | {"inputs": [f"{n}" if n else "y"], "outputs": [f"{n + 1}"]} for n in range(times)]
    return values


def test_a_block_with_parameters_runs_once():
    region = make_region(
        "blocks",
        lambda w, x: (x + w,),
        (Slot("w", (8,), COMPUTE_DTYPE, "parameter", "language"),),
        [("1", "tokens", 8)],
        ("blocks.0",),
    )
    values = program(node("neg.default", INPUT))
    values["regions"] = copy.deepcopy(to_json(region_program(region)))["regions"]
    from_json(values)
    with pytest.raises(IncompatibleError, match="blocks.0.* is called twice"):
        from_json(repeated(values, 1))


def test_parts_without_parameters_run_no_more_than_twice_as_often_as_there_are_parts():
    values = program(node("neg.default", INPUT))
    from_json(repeated(values, 1))
    with pytest.raises(IncompatibleError, match="3 calls of 1 parts"):
        from_json(repeated(program(node("neg.default", INPUT)), 2))


def test_a_block_of_this_size_is_read():
    assert from_json(program(*doubled(3))).regions["blocks"].instances == ("blocks.0",)
