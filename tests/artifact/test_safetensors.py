"""The safetensors header: strict reading, agreement with the library, raw bytes."""

from __future__ import annotations

import json

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmbuild.artifact import safetensors as tensors
from vlmbuild.artifact.safetensors import codes, encode_header, frame_header, tensor_bytes
from vlmbuild.errors import SourceError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def dtypes():
    return {code: dtype for dtype, code in codes().items()}


def read_header(path):
    with path.open("rb") as stream:
        return tensors.read_header(stream.fileno(), path, path.name)


def write(path, header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refused(path, words):
    with pytest.raises(SourceError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_every_dtype_of_the_library(tmp_path):
    written = {code: torch.zeros(2, 3, dtype=dtype) for code, dtype in dtypes().items()}
    safetensors.torch.save_file(written, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors")
    assert {name: info.dtype for name, info in infos.items()} == dict(dtypes())
    assert set(dtypes().items()) == set(safetensors.torch._TYPES.items())
    assert all(info.shape == (2, 3) and info.end - info.start == 6 * info.dtype.itemsize for info in infos.values())


@pytest.mark.parametrize("dtype", dtypes().values(), ids=dtypes())
def test_bytes_are_raw(dtype):
    raw = torch.arange(16, dtype=torch.uint8) % 2
    tensor = raw.view(dtype)
    assert tensor_bytes(tensor) == bytes(raw.tolist())
    assert tensor_bytes(tensor[:0]) == b""
    assert tensor_bytes(tensor[0]) == bytes(raw[: dtype.itemsize].tolist())


def test_bytes_of_strided_and_trainable_tensors():
    tensor = torch.arange(6.0).reshape(2, 3)
    assert tensor_bytes(tensor.T.requires_grad_()) == tensor_bytes(torch.tensor([0.0, 3, 1, 4, 2, 5]))
    not_a_number = torch.tensor([0x7F81], dtype=torch.int16).view(torch.bfloat16)
    assert tensor_bytes(not_a_number) == b"\x81\x7f"


def test_header_written_is_header_read(tmp_path):
    header = frame_header(encode_header([("é", torch.bfloat16, (2, 2), 0, 8)]))
    assert len(header) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(header + bytes(8))
    (info,) = read_header(tmp_path / "x.safetensors").values()
    assert (info.name, info.dtype, info.shape) == ("é", torch.bfloat16, (2, 2))
    assert (info.start, info.end) == (len(header), len(header) + 8)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_truncation_is_counted(tmp_path):
    path = write(tmp_path / "x", {"a": F32})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, f"it is truncated: {size - 1} bytes of {size}. Download or convert it again")
    path.write_bytes(path.read_bytes()[:20])
    refused(path, "it is truncated: 20 bytes of at least")
    path.write_bytes(b"")
    refused(path, "it is truncated: 0 bytes of at least 8")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b' {"a": {}}', "does not begin with '{'"),
        (b"[]", "does not begin with '{'"),
        (b'{"a":1,"a":2}', "'a' comes twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32"}}', "'dtype' comes twice"),
        (b'{"a":', "not valid JSON"),
        (b'{"\xff":1}', "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
        ({"__metadata__": {"format": 1}}, "not an object of strings"),
        ({"__metadata__": []}, "not an object of strings"),
        ({"a": []}, "'a' does not have exactly dtype, shape and data_offsets"),
        ({"a": {**F32, "more": 1}}, "'a' does not have exactly"),
        ({"a": {**F32, "dtype": "F7"}}, "'a' has the unknown dtype 'F7'"),
        ({"a": {**F32, "dtype": []}}, "unknown dtype"),
        ({"a": {**F32, "shape": [-2]}}, "not lists of sizes"),
        ({"a": {**F32, "shape": [2.0]}}, "not lists of sizes"),
        ({"a": {**F32, "shape": [True, 2]}}, "not lists of sizes"),
        ({"a": {**F32, "data_offsets": [0]}}, "not lists of sizes"),
        ({"a": {**F32, "data_offsets": [0, 4]}}, r"'a' has 4 bytes of data, but F32 \[2\] needs 8"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, "'a' has -8 bytes of data"),
        ({"a": {**F32, "data_offsets": [4, 12]}}, "'a' leaves a hole before it"),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, "'b' overlaps the one before it"),
        ({}, "8 bytes follow its last tensor"),
    ],
)
def test_malformed_headers(tmp_path, header, words):
    refused(write(tmp_path / "x", header), words)


def test_limits(tmp_path, monkeypatch):
    path = write(tmp_path / "x", {"a": F32})
    monkeypatch.setattr(tensors, "MAX_TENSORS", 0)
    refused(path, "it has 1 tensors; the limit is 0")
    path.write_bytes((2**40).to_bytes(8, "little"))
    refused(path, "its header is 1099511627776 bytes long; the limit is 33554432")


def test_empty_tensors_and_scalars(tmp_path):
    written = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0), "none": torch.zeros(3, 0)}
    safetensors.torch.save_file(written, tmp_path / "x")
    assert {name: info.shape for name, info in read_header(tmp_path / "x").items()} == {
        "empty": (0, 4),
        "scalar": (),
        "none": (3, 0),
    }


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_never_accepts_what_the_library_refuses(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x"
    content = bytearray(write(path, {"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, bytes(16)).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        read_header(path)
    except SourceError:
        return
    with safetensors.safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(read_header(path))
