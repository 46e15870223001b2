"""The lock's text: read back as it was, the same in every process, and mistakes in it are said."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from make_locks import LOCKS

from vlmbuild.builder.tracing import trace
from vlmbuild.errors import UsageError
from vlmbuild.locks import kernel_table
from vlmbuild.locks.document import Lock, read_lock
from vlmbuild.locks.make import lock_traced
from vlmbuild.quant.spec import Override, QuantSpec
from vlmbuild.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = [
    Recipe(attention="triton", dtype="float16"),
    Recipe(quantize=QuantSpec(format="int8", skip=("*.o_proj",)), require=("fuse_rope",)),
    Recipe(quantize=QuantSpec(overrides=(Override("*.down_proj", "fp4", blocksize=128),))),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["float16", "skip", "override"])
def test_text_round_trip(recipe):
    lock = replace(read_lock(LOCKS / "qwen2-vl-2b-none-sdpa.lock"), recipe=recipe)
    text = lock.to_text()
    again = Lock.from_text(text, "here")
    assert again == lock
    assert again.to_text() == text


SCRIPT = """
import sys
sys.path[:0] = ["tests/helpers", "tests/locks"]
from test_document import small_lock_text
print(small_lock_text(sys.argv[1]))
"""


def small_lock_text(path):
    """Lock the model at the path; SDPA has few kernels to compile, here for one target."""
    kernel_table.TARGETS = (90,)
    return lock_traced(
        trace(tiny.config_values() | {"_name_or_path": path}, "tiny"), Recipe(attention="sdpa")
    ).to_text()


@pytest.mark.slow
def test_same_text_whatever_the_hash_seed_and_the_path(tmp_path, monkeypatch):
    """Here, and in a process with a hash seed, a home and compiler caches of its own."""
    monkeypatch.setattr(kernel_table, "TARGETS", kernel_table.TARGETS)
    own = {"PYTHONHASHSEED": "77", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    command = [sys.executable, "-c", SCRIPT, "/somewhere/else"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    here = small_lock_text("/somewhere")
    assert done.stdout.rstrip("\n") == here.rstrip("\n")
    assert "[kernels." in here
    assert str(ROOT) not in here


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no toml = = 1", "cannot be read as a lock"),
        ('schema = "vlmbuild.lock/0"', "has schema 'vlmbuild.lock/0'"),
        ('schema = "vlmbuild.lock/2"', "'regions', .* is missing"),
    ],
)
def test_what_is_no_lock_is_said(tmp_path, text, message):
    file = tmp_path / "x.lock"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_lock(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_lock(tmp_path / "missing.lock")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[dimensions]\n", "[dimensions_]\n", "'dimensions' is missing"),
        ("[regions.lm_head]", "[[regions.lm_head]]", "regions.lm_head is .*expected a table"),
        ('source = "tests', 'source = 1979-05-27 # "', "source is datetime.date.*expected str"),
        ('"architectures": [', '"architectures": [[', "cannot be read as a lock"),
        ("spilled = 0, ", "", "'spilled' is missing"),
        ('tensor_core = "none"', 'tensor_core = "foo"', "tensor_core is 'foo'"),
        ("instances = ", "instances = 1.", "instances is 1.*expected int"),
        ("exact = true", 'exact = "yes"', "exact is 'yes'; expected bool"),
        ('attention = "sdpa"', 'attention = "foo"', "attention cannot be 'foo'"),
        ("refusals = [", "more = [", "has more, which is unknown"),
    ],
)
def test_a_spoiled_lock_is_said(tmp_path, old, new, message):
    text = (LOCKS / "qwen2-vl-2b-none-sdpa.lock").read_text()
    assert old in text
    file = tmp_path / "x.lock"
    file.write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=message):
        read_lock(file)


def test_pipes_and_huge_files_are_refused_at_once(tmp_path):
    file = tmp_path / "model.lock"
    file.touch()
    os.truncate(file, 6 * 2**30)  # sparse
    with pytest.raises(UsageError, match=r"model.lock.* more than \d+ bytes"):
        read_lock(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UsageError, match="model.lock.* not a regular file"):
        read_lock(file)
