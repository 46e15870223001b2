"""The manifest: round trip, identity, and strict parsing."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmbuild.artifact import manifest as module
from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.artifact.manifest import FileEntry, Manifest
from vlmbuild.errors import IncompatibleError, IntegrityError

DIGEST = hashlib.sha256(b"x").hexdigest()
ENTRIES = (FileEntry("a/x.bin", 1, DIGEST, "data"), FileEntry("config.json", 0, "0" * 64, "config"))


def example(**changes):
    fields = {
        "name": "model",
        "target": "trainable",
        "files": ENTRIES,
        "source": ({"uri": "hub", "files": [{"path": "p", "digest": DIGEST}]},),
        "recipe": {"quantize": None, "require": ("fuse-mrope",)},
        "passes": ({"name": "fuse-mrope", "matches": 2, "refusals": []},),
        "toolchain": {"torch": "2.13.0"},
        "numerics": ({"case": "golden", "atol": "1e-5"},),
    }
    return Manifest(**{**fields, **changes})


def edited(**changes):
    value = {**json.loads(example().to_bytes()), **changes}
    return canonical_json({key: item for key, item in value.items() if item is not ...})


def test_round_trip_and_id():
    manifest = example()
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    assert manifest.id == "sha256:" + hashlib.sha256(data).hexdigest()
    raw = bytes.fromhex(DIGEST) + bytes(32)
    assert manifest.root_digest == hashlib.sha256(raw).hexdigest()
    assert manifest.total_bytes == 1
    assert manifest.entry("config.json") == ENTRIES[1]
    assert manifest.entry("other") is None


def test_order_of_keys_does_not_matter():
    assert example(recipe={"a": 1, "b": 2}).id == example(recipe={"b": 2, "a": 1}).id


def test_a_later_change_of_the_argument_does_not_show():
    recipe = {"list": [1]}
    manifest = example(recipe=recipe)
    recipe["list"].append(2)
    assert manifest.recipe == {"list": [1]}


def test_sums_include_the_manifest():
    lines = example().sums().decode().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["a/x.bin", "config.json", "manifest.json"]
    assert lines[2].startswith(example().id.removeprefix("sha256:"))


NAMES = st.text("abcdefgh", min_size=1, max_size=4)
ENTRY = st.builds(
    FileEntry,
    NAMES,
    st.integers(0, 2**63 - 1),
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.sampled_from(module.ROLES),
)


@settings(max_examples=20)
@given(st.lists(ENTRY, unique_by=lambda entry: entry.path, max_size=5), st.dictionaries(NAMES, st.integers(0, 9)))
def test_any_manifest_round_trips(entries, recipe):
    manifest = example(files=tuple(sorted(entries, key=lambda entry: entry.path)), recipe=recipe)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@settings(max_examples=60)
@given(st.data())
def test_any_changed_byte_is_refused_or_changes_the_id(data):
    written = bytearray(example().to_bytes())
    position = data.draw(st.integers(0, len(written) - 1))
    written[position] ^= data.draw(st.integers(1, 255))
    try:
        manifest = Manifest.from_bytes(bytes(written))
    except (IntegrityError, IncompatibleError):
        return
    assert manifest.id != example().id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra": 1}, "missing or unknown keys: extra"),
        ({"recipe": ...}, "missing or unknown keys: recipe"),
        ({"files": {}}, "files is not a list"),
        ({"files": [1]}, r"files\[0\] is not a JSON object"),
        ({"files": [{"path": "a"}]}, r"files\[0\] has missing or unknown keys: algorithm, digest, role, size"),
        ({"name": ""}, "name is not a string, or empty"),
        ({"target": 1}, "target is not a string"),
        ({"source": {}}, "source is not a list"),
        ({"source": ["x"]}, "source holds something that is not a JSON object"),
        ({"recipe": []}, "recipe holds something"),
        ({"passes": [{"name": "p", "matches": 1}]}, "missing or unknown keys: refusals"),
        ({"passes": [{"name": "p", "matches": -1, "refusals": []}]}, "'p' has the match count -1"),
        ({"passes": [{"name": "p", "matches": True, "refusals": []}]}, "match count True"),
        ({"passes": [{"name": 1, "matches": 1, "refusals": []}]}, "not a string, or refusals"),
        ({"root_digest": "0" * 64}, "root_digest does not follow"),
        ({"trust": {"code": ["config.json"]}}, "trust does not follow"),
        ({"schema": "other/1"}, "so it is not a vlmbuild artifact's"),
        ({"schema": ...}, "so it is not a vlmbuild artifact's"),
    ],
)
def test_invalid_manifests(changes, words):
    with pytest.raises(IntegrityError, match=words):
        Manifest.from_bytes(edited(**changes))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("path", "../x", "'../x' is refused"),
        ("size", -1, "the size -1"),
        ("size", True, "the size True"),
        ("size", "1", "the size '1'"),
        ("algorithm", "md5", "'md5' is not 'sha256'"),
        ("digest", "0" * 63, "64 lowercase hex"),
        ("digest", "A" * 64, "64 lowercase hex"),
        ("digest", None, "64 lowercase hex"),
        ("role", "other", "not one of code, config, data, graph, processor, weights"),
        ("role", ["code"], "not one of"),
    ],
)
def test_invalid_entries(field, value, words):
    files = json.loads(example().to_bytes())["files"]
    files[0][field] = value
    with pytest.raises(IntegrityError, match=words):
        Manifest.from_bytes(edited(files=files))


def test_a_size_over_63_bits_is_refused():
    written = example().to_bytes().replace(b'"size":1}', b'"size":9223372036854775808}')
    with pytest.raises(IntegrityError, match="64 bits"):
        Manifest.from_bytes(written)


@pytest.mark.parametrize("path", ["m.pt2", "a/b.SO", "x.py", "k.cubin", "w.pth"])
def test_files_that_run_code_say_so(path):
    with pytest.raises(IntegrityError, match="can run code, so its role is 'code', not 'data'"):
        FileEntry(path, 0, DIGEST, "data")
    manifest = example(files=(FileEntry(path, 0, DIGEST, "code"),))
    assert manifest.trust == {"code": [path]}


def test_order_and_collisions_of_files():
    files = json.loads(example().to_bytes())["files"]
    with pytest.raises(IntegrityError, match="not sorted"):
        Manifest.from_bytes(edited(files=files[::-1]))
    with pytest.raises(IntegrityError, match="collide"):
        Manifest.from_bytes(edited(files=[files[0], files[0]]))


def test_too_many_files(monkeypatch):
    data = example().to_bytes()
    monkeypatch.setattr(module, "MAX_FILES", 1)
    with pytest.raises(IntegrityError, match="lists 2 files; the limit is 1"):
        Manifest.from_bytes(data)


def test_another_major_version():
    with pytest.raises(IncompatibleError, match=r"vlmbuild\.artifact/3"):
        Manifest.from_bytes(edited(schema="vlmbuild.artifact/3", must_understand=["x"]))


def test_not_an_object():
    with pytest.raises(IntegrityError, match="not a JSON object"):
        Manifest.from_bytes(b"[]\n")


def test_floats_in_a_recipe_are_named():
    with pytest.raises(TypeError, match=r"recipe\.threshold is a float"):
        example(recipe={"threshold": 0.5})
