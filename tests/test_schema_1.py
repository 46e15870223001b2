"""An artifact and a lock that an earlier schema wrote still open."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch

import vlmbuild
from vlmbuild.locks.check import check
from vlmbuild.locks.document import read_lock
from vlmbuild.recipe import Recipe
from vlmbuild.runtime.aoti.code_index import CodeIndex

DATA = Path(__file__).parent / "data" / "schema-1"
LOSS = 5.855007648468018
"""Loss in the version that wrote the artifact, on the batch below; bfloat16."""


def test_an_artifact_verifies_loads_and_is_described(run):
    assert vlmbuild.verify(DATA / "artifact").schema == "vlmbuild.artifact/1"
    model, _ = vlmbuild.load(DATA / "artifact")
    model.processor = None  # its special tokens have other ids
    batch, labels = tiny.make_batch([[5, (1, 4, 6), 7]])
    with torch.no_grad():
        assert abs(model(**batch, labels=labels).loss.item() - LOSS) < 0.02
    code, out, _ = run("inspect", DATA / "artifact", "--json")
    assert code == 0
    assert [entry["name"] for entry in json.loads(out)["passes"]][:2] == ["normalize", "fuse_rope"]


def test_a_lock_is_read_and_holds():
    (path,) = DATA.glob("*.lock")
    assert "fuse_mrope" in path.read_text() and "fuse_rope" in read_lock(path).passes
    (checked,) = check([path], kernels=False, processes=1)
    assert not checked.fails(), checked


def test_names_of_passes_and_caches():
    assert Recipe.from_mapping({"require": ["fuse_mrope"]}).require == ("fuse_rope",)
    platform = {"machine": "x86_64", "level": "", "features": [], "torch": "2.13.0", "libc": ""}
    record = {"platform": platform, "dtype": "float32", "regions": {"growing": {}, "static": {}}}
    assert set(CodeIndex.from_record(record).regions) == {"dynamic", "static"}
