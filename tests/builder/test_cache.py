"""`from_pretrained`: built once, shared by processes, never unverified."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import vlmbuild
from vlmbuild.errors import UsageError

SCRIPT = """
import sys, vlmbuild
model, processor = vlmbuild.from_pretrained(sys.argv[1], cache_dir=sys.argv[2], quantize="nf4", dtype="float32")
print("loaded", sum(b.numel() for b in model.buffers()))
"""


def entries(cache):
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_two_processes_share_one_build_and_a_damaged_one_is_rebuilt(checkpoint, nf4, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(checkpoint), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].split("\n")[-2] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    (entry,) = entries(tmp_path)
    assert vlmbuild.verify(entry).id == nf4.manifest.id
    written = (entry / "manifest.json").stat().st_mtime_ns

    options = {"cache_dir": tmp_path, "quantize": "nf4", "dtype": "float32"}
    started = time.monotonic()
    vlmbuild.from_pretrained(checkpoint, **options)
    assert (entry / "manifest.json").stat().st_mtime_ns == written, f"built again in {time.monotonic() - started:.0f} s"

    (entry / "model.safetensors").write_bytes(b"damaged")
    vlmbuild.from_pretrained(checkpoint, **options)
    assert entries(tmp_path) == [entry]
    assert vlmbuild.verify(entry).id == nf4.manifest.id


def test_unknown_options_are_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="from_pretrained: unknown option 'load_in_4bit'"):
        vlmbuild.from_pretrained(checkpoint, cache_dir=tmp_path, load_in_4bit=True)
