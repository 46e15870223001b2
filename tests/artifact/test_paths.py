"""File paths in an artifact: one file on every system, never outside."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbuild.artifact.paths import check_collisions, check_path
from vlmbuild.errors import IntegrityError


@pytest.mark.parametrize("path", ["a", "onnx/decoder_model_merged.onnx", ".hidden", "é/ü.json", "a b", "a" * 255])
def test_plain_paths_pass(path):
    assert check_path(path) == path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (7, "is not a string"),
        ("", "empty"),
        ("..", "component '..'"),
        ("a/../../b", "component '..'"),
        ("./a", r"component '\.'"),
        ("a//b", "component ''"),
        ("a/", "component ''"),
        ("/etc/passwd", "absolute"),
        ("a\\b", "backslash"),
        ("C:", "colon"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\u202eb", "invisible"),
        ("e\u0301", "NFC"),
        ("\ud800", "surrogate"),
        ("a" * 256, "longer than 255"),
        ("é" * 128, "longer than 255"),
        ("a/NUL.txt", "reserved name"),
        ("com1", "reserved name"),
        (".git/config", "reserved name"),
        (".GITATTRIBUTES", "reserved name"),
        ("a /b", "space"),
        ("a./b", "dot"),
        ("manifest.json", "belongs to the artifact"),
        ("sha256sums", "belongs to the artifact"),
        ("Manifest.json/x", "belongs to the artifact"),
    ],
)
def test_refused_paths(path, words):
    with pytest.raises(IntegrityError, match=words):
        check_path(path)


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b", "\\", "c:", "~", "\u0301", "NUL"]), min_size=1, max_size=5))
def test_what_passes_stays_inside(parts):
    path = "/".join(parts)
    try:
        check_path(path)
    except IntegrityError:
        return
    assert posixpath.normpath(path) == path
    assert posixpath.join("/root", path).startswith("/root/")


@pytest.mark.parametrize(
    "paths", [("a", "A"), ("a", "a"), ("a", "a/b"), ("a/b", "a"), ("A/x", "a/y"), ("straße", "STRASSE"), ("A", "a/b")]
)
def test_collisions(paths):
    with pytest.raises(IntegrityError, match="collide.*Rename one"):
        check_collisions(paths)


def test_no_collision():
    check_collisions(["a/b", "a/c", "d", "ab"])
