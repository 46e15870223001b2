"""The index of compiled code: what it says is checked before a package is opened."""

from __future__ import annotations

import copy
import json

import pytest

from vlmbuild.errors import IncompatibleError
from vlmbuild.ir.dims import parse_shape
from vlmbuild.runtime.aoti.code import read_index
from vlmbuild.runtime.aoti.code_index import CodeEntry, CodeFile, CodeIndex
from vlmbuild.runtime.aoti.platform import check_platform, this_platform

ENTRY = CodeEntry("0" * 64, CodeFile("a.pt2", ((0, "float32"), (1, "int64"))), CodeFile("b.pt2", ()), (0, 1))
RECORD = CodeIndex(this_platform(), "float32", {"dynamic": {"layers": ENTRY}}).record()


def read(record):
    text = record if isinstance(record, str) else json.dumps(record)
    index = read_index(lambda _: text.encode(), "artifact")
    check_platform(index.platform, "artifact")
    return index


def test_it_comes_back():
    assert read(RECORD).record() == RECORD


def changed(value, *path):
    record = copy.deepcopy(RECORD)
    place = record
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return record


INPUTS = ("regions", "dynamic", "layers", "code", "inputs")


@pytest.mark.parametrize(
    "record",
    [
        changed(5, "platform", "machine"),
        changed("avx", "platform", "features"),
        changed([5], "platform", "features"),
        changed("glibc ²", "platform", "libc"),
        changed(None, "platform"),
        changed([], "regions"),
        changed(float("inf"), *INPUTS, 0, 0),
        changed(True, *INPUTS, 0, 0),
        changed("nn", *INPUTS, 0, 1),
        changed([1.5, 0], "regions", "dynamic", "layers", "token_axis"),
        changed(None, "regions", "dynamic", "layers", "code", "file"),
        "[" * 100_000,
        "5",
    ],
    ids=lambda record: json.dumps(record)[-30:],
)
def test_what_is_no_index_is_refused(record):
    with pytest.raises(IncompatibleError):
        read(record)


class Shapes:
    activations = (parse_shape(("batch", 4)), parse_shape((8,)))


@pytest.mark.parametrize(
    ("entry", "fits"),
    [
        (CodeEntry("", CodeFile("a.pt2", ((1, "int64"), (0, "float32")))), True),
        (CodeEntry("", CodeFile("a.pt2", ((0, "float32"),))), False),
        (CodeEntry("", CodeFile("a.pt2", ((0, "float32"), (0, "float32")))), False),
        (CodeEntry("", CodeFile("a.pt2", ((0, "float32"), (10**30, "float32")))), False),
        (ENTRY, False),
    ],
)
def test_inputs_are_those_of_the_region(entry, fits):
    assert entry.fits(Shapes) == fits
