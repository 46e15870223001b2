"""The archive of a package: as torch writes it, and nothing else."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch

from vlmbuild.errors import IncompatibleError
from vlmbuild.runtime.aoti.archive import check_package


@pytest.fixture(scope="module")
def package():
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    for name, data in (("data/code.so", b"x" * 5000), ("data/empty", b""), ("version.txt", b"1")):
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return stream.getvalue()


def archive(*members, method=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        for name in members:
            file.writestr(name, b"\0" * 1000)
    return stream.getvalue()


def refused(package, words):
    with pytest.raises(IncompatibleError, match=f"x.pt2 is not a package of torch: .*{words}") as caught:
        check_package(package, "art: x.pt2")
    assert caught.value.exit_code == 5


def test_what_torch_writes(package):
    check_package(package, "x")
    check_package(archive("m/a", "m/b/c"), "x")


def test_names():
    refused(archive("m/a", "m/../../evil"), "'m/../../evil'")
    refused(archive("/m/a"), "'/m/a'")
    refused(archive("m/a", "n/a"), "one folder")
    refused(archive("a"), "one folder")
    refused(archive("m/a", "m/A"), "one name")
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = archive("m/a", "m/a")
    refused(twice, "one name")


def test_compressed_members():
    refused(archive("m/a", method=zipfile.ZIP_DEFLATED), "'m/a' is compressed")


def test_bytes_that_belong_to_no_member(package):
    whole = archive("m/a", "m/b")
    refused(b"#!/bin/sh\n" + whole, "no member")
    refused(b"junk" + package, "")
    offset = whole.rindex(b"m/a", 0, whole.index(b"PK\1\2"))
    refused(whole[:offset] + b"m/z" + whole[offset + 3 :], "another name before its data")
    stream = io.BytesIO(whole)
    with zipfile.ZipFile(stream, "a") as file:
        file.start_dir += 500  # a hole before the directory
    stream.seek(0)
    holed = whole[: whole.index(b"PK\1\2")] + bytes(500) + whole[whole.index(b"PK\1\2") :]
    refused(holed, "")


@pytest.mark.parametrize("data", [b"", b"PK", b"x" * 100])
def test_no_archive(data):
    refused(data, "")


def test_truncated(package):
    for size in (len(package) // 2, len(package) - 1):
        refused(package[:size], "")
