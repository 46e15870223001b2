"""Canonical JSON: one byte form, and nothing else is accepted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbuild.artifact.canonical import MAX_BYTES, canonical_json, parse_canonical
from vlmbuild.errors import IntegrityError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_round_trip(value):
    assert parse_canonical(canonical_json(value)) == value


@given(VALUES, st.data())
def test_other_spellings_are_refused(value, data):
    written = canonical_json(value)
    position = data.draw(st.integers(0, len(written)))
    with pytest.raises(IntegrityError):
        parse_canonical(written[:position] + b" " + written[position:] + b" ")


def test_the_form():
    assert canonical_json({"b": (1, True, None), "a": "é"}) == '{"a":"é","b":[1,true,null]}\n'.encode()


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (1.5, TypeError, "value is a float.*write it as a string"),
        ({"a": [0, {"b": float("nan")}]}, TypeError, r"value\.a\[1\]\.b is a float"),
        ({1: 2}, TypeError, "has the key 1; only strings"),
        (b"x", TypeError, "value is a bytes"),
        ("\ud800", ValueError, "lone surrogate"),
        ({"\ud800": 1}, ValueError, "a key of value holds a lone surrogate"),
        (2**63, ValueError, "64 bits"),
    ],
)
def test_values_that_do_not_exist(value, error, words):
    with pytest.raises(error, match=words):
        canonical_json(value)


def test_depth_is_limited():
    def nested(depth):
        return [] if depth == 0 else [nested(depth - 1)]

    assert parse_canonical(canonical_json(nested(32))) == nested(32)
    with pytest.raises(ValueError, match="deeper than 32"):
        canonical_json(nested(33))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a":1,"a":2}\n', "'a' comes twice"),
        (b'{"a":1.0}\n', "1.0 is not an integer"),
        (b'{"a":1e400}\n', "1e400 is not an integer"),
        (b"[NaN]\n", "NaN is not an integer"),
        (b"[-Infinity]\n", "Infinity"),
        (b"\xef\xbb\xbf[]\n", "BOM"),
        (b"[]\n[]", "Extra data"),
        (b"[]", "differ from the canonical form"),
        (b"[-0]\n", "differ from the canonical form"),
        (b'["\\u00e9"]\n', "differ from the canonical form"),
        (b'["\\ud800"]\n', "lone surrogate"),
        (b"[" * 40 + b"]" * 40 + b"\n", "deeper than 32"),
        (b"[" * 200_000, "recursion"),
        (b"\xff\n", "utf-8"),
        (b"1" * 5000 + b"\n", "digits"),
        (b" " * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_refused_bytes(data, words):
    with pytest.raises(
        IntegrityError, match=f"manifest.json is not canonical JSON: .*{words}.*Build the artifact again"
    ):
        parse_canonical(data)


def test_standard_parsers_read_it():
    assert json.loads(canonical_json({"a": ["\u2028", 1]})) == {"a": ["\u2028", 1]}
