"""Commands that read artifacts take hub ids, with a revision. The hub cannot be reached; its cache is filled as it fills it."""

from __future__ import annotations

import json

import pytest
from hub_cache import COMMIT, cached
from huggingface_hub import constants

from vlmbuild import verify


@pytest.fixture
def hub(plain, tmp_path, monkeypatch):
    """A hub's cache that holds an artifact as owner/name."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cached(plain.path, tmp_path / "hub")


@pytest.mark.parametrize(
    "source", ["owner/name", "owner/name --revision main", "owner/name@main", f"owner/name@{COMMIT}"]
)
def test_verify_and_inspect(run, hub, plain, source):
    for command in (("verify", "--id", plain.manifest.id), ("inspect",)):
        code, out, err = run(*command, *source.split(), "--json")
        assert code == 0, err
        assert (json.loads(out)["id"], json.loads(out)["path"]) == (plain.manifest.id, str(hub))


def test_forms_of_inspect(run, hub, tmp_path):
    assert run("inspect", "owner/name", "--format", "dot")[1].startswith("digraph")
    assert run("inspect", "owner/name", "--html", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_run_pins_the_identity(run, hub, plain):
    options = ("--prompt", "Hello", "--max-new-tokens", 2, "--json")
    code, out, err = run("run", "owner/name", "--id", plain.manifest.id, *options)
    assert code == 0 and json.loads(out)["new_tokens"] <= 2, err
    other = "sha256:" + "0" * 64
    for artifact in ("owner/name", plain.path):
        code, out, err = run("run", artifact, "--id", other, *options)
        assert code == 3 and other in err and plain.manifest.id in err
    assert run("run", "owner/name", "--id", "sha256:12", *options)[0] == 2


def test_build_keeps_the_dtype_of_an_artifact(run, hub, plain, tmp_path):
    code, _, err = run("build", "owner/name@main", "-o", tmp_path / "built")
    assert code == 0, err
    manifest = verify(tmp_path / "built")
    assert manifest.recipe["dtype"] == plain.manifest.recipe["dtype"] == "float32"
    assert manifest.source[0]["uri"] == f"owner/name@{COMMIT}"


def test_diff(run, hub, plain):
    assert run("diff", "owner/name@main", "owner/name", "--new-revision", COMMIT, "--no-kernels")[0] == 0
    code, _, err = run("diff", "owner/name", plain.path, "--new-revision", "main")
    assert code == 2 and "--new-revision" not in err and "'main'" in err


@pytest.mark.parametrize("command", ["verify", "inspect", "run --prompt Hello", "build -o out", "diff owner/name"])
def test_what_the_cache_lacks(run, hub, command):
    name, *options = command.split()
    code, _, err = run(name, *options, "owner/other")
    assert code == 1 and "owner/other" in err and "HF_HUB_OFFLINE" in err
    if name != "diff":
        code, _, err = run(name, *options, "owner/name", "--revision", "v9")
        assert code == 1 and "owner/name" in err
    assert run("verify", hub, "--revision", "main")[0] == 2
    code, _, err = run("verify", "owner/name@main", "--revision", COMMIT)
    assert code == 2 and "owner/name@main" in err and COMMIT in err
