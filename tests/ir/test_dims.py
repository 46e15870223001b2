"""Sizes as polynomials: they print as they were written, and compute as numbers do."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from vlmbuild.ir.dims import Dim, evaluate_shape, parse_shape, shape_json, shape_names, size_text

LOCKS = sorted((Path(__file__).parents[2] / "artifacts" / "locks").glob("*.lock"))
TEXTS = [
    "4*merged",
    "batch*new",
    "past + new",
    "new + past",
    "rows - 3",
    "-3*rows + 1",
    "24576*sequence**2 + 93585408*sequence",
    "0",
    "-7",
]


@pytest.mark.parametrize("text", TEXTS)
def test_sizes_print_as_they_were_written(text):
    assert str(Dim.parse(text)) == text


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_formulas_of_locks_come_back(lock):
    formulas = re.findall(r'^(?:flops|bytes) = "(.*)"$', lock.read_text(), re.MULTILINE)
    assert formulas and [str(Dim.parse(text).ordered()) for text in formulas] == formulas


def test_order_does_not_count():
    assert Dim.parse("past + new") == Dim.parse("new + past")
    assert len({Dim.parse("batch*new"), Dim.parse("new*batch"), Dim.parse("batch"), "batch"}) == 3


def test_arithmetic_is_that_of_numbers():
    draw = random.Random(0)
    for _ in range(100):
        sizes = {name: draw.randint(1, 9) for name in "xyz"}
        one, other = (
            Dim.parse(f"{draw.randint(-4, 4)}*x*y + {draw.choice('xyz')} - {draw.randint(0, 3)}") for _ in range(2)
        )
        a, b = one.evaluate(sizes), other.evaluate(sizes)
        assert [d.evaluate(sizes) for d in (one + other, one * other, 3 * one, one + 2)] == [a + b, a * b, 3 * a, a + 2]
        assert one.substitute(sizes) == a and Dim.parse(str(one)) == one


def test_substituting_some_names_leaves_a_size():
    assert str(Dim.parse("past + new").substitute({"new": 1})) == "past + 1"
    assert Dim.parse("batch*new").substitute({"batch": 1, "new": 1}) == 1
    assert str(Dim.parse("4*merged").substitute({"merged": Dim.parse("2*images")})) == "8*images"


@pytest.mark.parametrize("text", ["(rows//2)", "4*(rows//2)", "Max(3, rows)", "rows*((rows + 1)//4)"])
def test_other_expressions_are_opaque(text):
    size = Dim.parse(text)
    assert str(size) == text and size.names == ("rows",)
    with pytest.raises(KeyError):
        size.evaluate({"rows": 8})


@pytest.mark.parametrize("text", ["", "4*", "a b", "4merged", "a/b", "(a", "a**b", "a**100", "'a'", "1.5", "a and b"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        Dim.parse(text)


def test_shapes():
    shape = parse_shape((1, "4*merged", "batch*new"))
    assert shape_json(shape) == [1, "4*merged", "batch*new"]
    assert shape_names([shape, parse_shape(["batch"])]) == ("merged", "batch", "new")
    assert evaluate_shape(shape, {"merged": 2, "batch": 3, "new": 5}) == (1, 8, 15)


def test_a_symbol_that_begins_like_another_keeps_its_name():
    assert size_text("4*s47", {"s4": "samples", "s47": "merged"}) == "4*merged"
