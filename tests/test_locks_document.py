"""The lock's text: read back as it was, the same in every process, and mistakes in it are said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from make_locks import LOCKS

from vlmbuild.errors import UsageError
from vlmbuild.locks.document import Lock, read_lock
from vlmbuild.locks.making import lock_traced
from vlmbuild.quant_spec import Override, QuantSpec
from vlmbuild.recipe import Recipe
from vlmbuild.tracing import trace

ROOT = Path(__file__).parents[1]
RECIPES = [
    Recipe(attention="triton", dtype="float16"),
    Recipe(quantize=QuantSpec(format="int8", skip=("*.o_proj",)), require=("fuse_mrope",)),
    Recipe(quantize=QuantSpec(overrides=(Override("*.down_proj", "fp4", 128),))),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["float16", "skip", "override"])
def test_text_round_trip(recipe):
    lock = lock_traced(trace(tiny.config_values(), "tiny"), recipe, kernels=False)
    text = lock.to_text()
    again = Lock.from_text(text, "here")
    assert again == lock
    assert again.to_text() == text


SCRIPT = """
import sys
sys.path.insert(0, "tests")
import tiny
from vlmbuild.locks.making import lock_traced
from vlmbuild.tracing import trace
from vlmbuild.recipe import Recipe
recipe = Recipe(attention="sdpa")  # few kernels: each is compiled twice, cold
print(lock_traced(trace(tiny.config_values(layers=1, depth=1) | {"_name_or_path": sys.argv[1]}, "tiny"), recipe).to_text())
"""


def test_same_text_whatever_the_hash_seed_and_the_path(tmp_path):
    texts = []
    for seed in ("1", "77"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "HOME": str(tmp_path / seed)}
        environment["TRITON_CACHE_DIR"] = str(tmp_path / f"triton{seed}")
        command = [sys.executable, "-c", SCRIPT, f"/somewhere/{seed}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert "[kernels." in texts[0]
    assert str(ROOT) not in texts[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no toml = = 1", "is not a lock"),
        ('schema = "vlmbuild.lock/0"', "has schema 'vlmbuild.lock/0'"),
        ('schema = "vlmbuild.lock/1"', "not a whole lock"),
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
        ("spilled = 0, ", "", "'spilled' is missing"),
        ('tensor_core = "none"', 'tensor_core = "foo"', "tensor_core is 'foo'"),
        ("instances = ", "instances = 1.", "instances is 1"),
        ("exact = true", 'exact = "yes"', "exact is 'yes', and not a bool"),
        ('attention = "sdpa"', 'attention = "foo"', "attention cannot be 'foo'"),
        ("refusals = [", "more = [", "has more, which no lock has"),
    ],
)
def test_a_spoiled_lock_is_said(tmp_path, old, new, message):
    text = (LOCKS / "qwen2-vl-2b-none-sdpa.lock").read_text()
    assert old in text
    file = tmp_path / "x.lock"
    file.write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=message):
        read_lock(file)
