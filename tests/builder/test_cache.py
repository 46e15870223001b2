"""`from_pretrained`: built once, shared by processes, never unverified; the same bytes wherever it is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from checkpoints import copied

import vlmbuild
from vlmbuild.errors import IntegrityError, SourceError, UsageError

SCRIPT = """
import os, sys
os.umask(0o077)
import vlmbuild
model, processor = vlmbuild.from_pretrained(sys.argv[1], cache_dir=sys.argv[2], quantize="nf4", dtype="float32")
print("loaded", sum(b.numel() for b in model.buffers()))
"""


def entries(cache):
    return sorted(path for path in cache.iterdir() if path.is_dir())


@pytest.mark.slow
def test_two_processes_share_one_build_and_a_damaged_one_is_rebuilt(checkpoint, nf4, tmp_path):
    source, cache = copied(checkpoint, tmp_path / "elsewhere"), tmp_path / "cache"
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(source), str(cache)]
    running = [
        subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate()[0].split("\n")[-2] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    (entry,) = entries(cache)
    assert vlmbuild.verify(entry).id == nf4.manifest.id
    subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=entry, check=True)
    written = (entry / "manifest.json").stat().st_mtime_ns

    options = {"cache_dir": cache, "quantize": "nf4", "dtype": "float32"}
    vlmbuild.from_pretrained(source, **options)
    assert (entry / "manifest.json").stat().st_mtime_ns == written

    (entry / "model.safetensors").write_bytes(b"damaged")
    model, _ = vlmbuild.from_pretrained(source, expected_id=nf4.manifest.id, **options)
    assert model.artifact_id == nf4.manifest.id
    with pytest.raises(IntegrityError, match=f"found {nf4.manifest.id}"):
        vlmbuild.from_pretrained(source, expected_id="sha256:" + "0" * 64, **options)
    assert entries(cache) == [entry]
    assert vlmbuild.verify(entry).id == nf4.manifest.id


def test_unknown_options_are_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="from_pretrained: unknown option 'load_in_4bit'"):
        vlmbuild.from_pretrained(checkpoint, cache_dir=tmp_path, load_in_4bit=True)


def test_the_processor_may_come_from_elsewhere(checkpoint, tmp_path):
    source, options = tmp_path / "source", {"cache_dir": tmp_path / "cache", "dtype": "float32"}
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, source)
    with pytest.raises(SourceError, match="no tokenizer"):
        vlmbuild.from_pretrained(source, **options)
    _, processor = vlmbuild.from_pretrained(source, processor="qwen2-vl-digits", **options)
    assert processor.tokenizer.convert_tokens_to_ids("<|image_pad|>") > 0
    vlmbuild.from_pretrained(source, processor=checkpoint, **options)
    assert len(entries(tmp_path / "cache")) == 2
