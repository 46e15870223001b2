"""`vlmbuild push` through huggingface_hub's own client, on a hub that speaks the real protocol."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fake_hub import TOKEN, Repository, fake_hub
from huggingface_hub import constants, utils
from republish import republish

import vlmbuild
from vlmbuild.artifact.hub import artifact_directory

REPO = "owner/name"


PREBUILT = Path(__file__).parents[2] / "artifacts/prebuilt"


@pytest.fixture(scope="module")
def nf4():
    return PREBUILT / "qwen2-vl-digits-nf4"


@pytest.fixture(scope="module")
def other():
    return PREBUILT / "qwen3-vl-digits-nf4"


def id_of(source):
    return vlmbuild.verify(artifact_directory(source)).id


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    waiting = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})  # before the client tries again
    monkeypatch.setattr(utils._http, "time", waiting)
    with fake_hub(monkeypatch, tmp_path / "hub") as server:
        yield server


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def writes(hub):
    return [request for request in hub.requests if request[0] != "GET" and request[0] != "HEAD"]


def test_what_was_pushed_loads_as_the_same_artifact(run, hub, nf4):
    code, out, err = run("push", nf4, REPO, "--private", "--json")
    assert code == 0, err
    pushed, repository = json.loads(out), hub.repositories[REPO]
    assert pushed["id"] == id_of(nf4) and pushed["commit"] == repository.branches["main"]
    assert repository.private and len(repository.commits) == 2  # the hub's own first one, and all files in one
    files = hub.files(REPO)
    assert files.keys() == {file["path"] for file in pushed["files"]} | {".gitattributes"}
    assert files["manifest.json"] == (nf4 / "manifest.json").read_bytes()
    assert {"PUT", "POST"} == {method for method, _ in writes(hub)}
    assert any(path.startswith("/lfs/complete/") for _, path in hub.requests)  # in parts
    assert any(path.startswith("/lfs/object/") for _, path in hub.requests)  # in one piece
    model, _ = vlmbuild.load(REPO, expected_id=id_of(nf4))
    assert model.artifact_id == id_of(nf4)
    code, out, err = run("verify", f"{REPO}@{pushed['commit']}", "--id", id_of(nf4))
    assert code == 0, err
    code, out, _ = run("push", nf4, REPO, "--json")
    assert code == 0 and json.loads(out)["commit"] == pushed["commit"]  # nothing has changed


def test_a_dry_run_writes_nothing(run, hub, nf4, monkeypatch):
    for token in (TOKEN, None):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        code, out, err = run("push", nf4, REPO, "--dry-run")
        assert code == 0, err
        assert not writes(hub) and not hub.repositories
        for text in ("model.safetensors", "library_name", id_of(nf4), REPO):
            assert text in out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = run("push", nf4, REPO, "--dry-run", "--json")
    assert code == 0 and "HF_HUB_OFFLINE" in json.loads(out)["note"], err
    code, _, err = run("push", nf4, REPO)
    assert code == 1 and "hf auth login" in err


def test_the_next_version_replaces_the_last_in_one_commit(run, hub, nf4, other, tmp_path):
    (signed := shutil.copytree(nf4, tmp_path / "signed")).joinpath("model.sig").write_text("signature")
    run("push", signed, REPO)
    assert hub.files(REPO)["model.sig"] == b"signature"
    code, out, err = run("push", other, REPO, "--message", "Unquantized", "--json")
    assert code == 0, err
    repository, pushed = hub.repositories[REPO], json.loads(out)
    assert pushed["replaces"] == id_of(nf4) and pushed["removed"] == ["model.sig"]
    assert len(repository.commits) == 3 and "Unquantized" in repository.messages.values()
    assert id_of(REPO) == id_of(other)


def test_a_branch(run, hub, nf4, other):
    run("push", other, REPO)
    code, out, err = run("push", nf4, REPO, "--revision", "nf4", "--json")
    assert code == 0, err
    assert f"{REPO}@nf4" in json.loads(out)["card"]
    ids = [id_of(source) for source in (REPO, f"{REPO}@nf4")]
    assert ids == [id_of(other), id_of(nf4)]


def test_foreign_files_are_kept_unless_the_user_says(run, hub, nf4):
    run("push", nf4, REPO)
    repository = hub.repositories[REPO]
    tree = repository.tree("main")
    repository.commit(
        "main", tree | {"train.py": ("regular", b"1"), ".gitignore": ("regular", b"manifest.json")}, "mine"
    )
    code, _, err = run("push", nf4, REPO)
    assert code == 1 and "train.py" in err and "--overwrite" in err
    code, out, err = run("push", nf4, REPO, "--overwrite", "--json")
    assert code == 0, err
    assert json.loads(out)["removed"] == [".gitignore", "train.py"]
    assert id_of(REPO) == id_of(nf4)


@pytest.mark.parametrize(
    ("token", "name", "private", "words"),
    [
        (None, REPO, False, ["hf auth login", "HF_TOKEN"]),
        ("hf_wrong", REPO, False, ["not accepted", "HF_TOKEN"]),
        (TOKEN, "other/name", False, ["other/name", "403", "write access"]),
        (TOKEN, REPO, True, ["public", "--private"]),
    ],
)
def test_what_the_hub_would_refuse(run, hub, nf4, monkeypatch, token, name, private, words):
    if private:
        run("push", nf4, REPO)
    before = len(hub.repositories)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    code, _, err = run("push", nf4, name, *(["--private"] if private else []))
    assert code == 1 and all(word in err for word in words), err
    assert len(hub.repositories) == before


@pytest.mark.parametrize("name", ["name", "a/b/c", "owner/na me", "owner/--name"])
def test_names_that_no_repository_has(run, nf4, name):
    code, _, err = run("push", nf4, name)
    assert code == 2 and name in err and "owner/name" in err


def test_a_lost_connection_publishes_nothing(run, hub, nf4):
    def refuse(method, path):
        if path.startswith("/lfs/object/"):
            raise ConnectionError

    hub.refuse = refuse
    code, _, err = run("push", nf4, REPO)
    assert code == 1 and "tokenizer.json" in err and "run the command again" in err
    assert hub.files(REPO).keys() == {".gitattributes"}
    arrived, hub.refuse = set(hub.objects), lambda *_: None
    assert arrived
    hub.requests.clear()
    code, _, err = run("push", nf4, REPO)
    assert code == 0, err
    assert not any(path.startswith("/lfs/") and digest in path for digest in arrived for _, path in hub.requests)
    assert id_of(REPO) == id_of(nf4)


def test_a_file_that_is_too_large(run, hub, nf4):
    hub.largest = 100_000
    code, _, err = run("push", nf4, REPO)
    assert code == 1 and "model.safetensors" in err and "larger than 100000 bytes" in err and "shards" in err
    assert hub.files(REPO).keys() == {".gitattributes"}


def test_somebody_else_writes_at_the_same_time(run, hub, nf4, other):
    run("push", other, REPO)
    repository = hub.repositories[REPO]

    def refuse(method, path):
        if path.endswith("/preupload/main") and len(repository.commits) == 2:
            repository.commit("main", repository.tree("main"), "another")

    hub.refuse = refuse
    code, _, err = run("push", nf4, REPO)
    assert code == 1 and "412" in err and "run the command again" in err
    assert hub.files(REPO)["manifest.json"] == (other / "manifest.json").read_bytes()


def test_a_changed_file_is_never_uploaded(run, hub, nf4, tmp_path):
    bad = shutil.copytree(nf4, tmp_path / "bad")
    data = bytearray((bad / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (bad / "model.safetensors").write_bytes(data)
    for options in ((), ("--dry-run",)):
        code, _, err = run("push", bad, REPO, *options)
        assert code == 3 and "model.safetensors" in err
    assert not hub.repositories and not writes(hub)


def test_the_card_says_what_the_manifest_says(run, hub, nf4, tmp_path):
    base = hub.repositories["owner/base"] = Repository(private=False)
    card = b"---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n"
    commit = base.commit("main", {"README.md": ("regular", card)}, "card")
    source = [{**vlmbuild.verify(nf4).source[0], "uri": f"owner/base@{commit}"}]
    artifact = republish(nf4, tmp_path / "art", {}, source=source)
    code, out, err = run("push", artifact, REPO, "--dry-run", "--json")
    assert code == 0, err
    text, manifest = json.loads(out)["card"], vlmbuild.verify(artifact)
    made = header(text)
    assert made["base_model"] == "owner/base" and made["base_model_relation"] == "quantized"
    assert made["library_name"] == "transformers" and made["pipeline_tag"] == "image-text-to-text"
    assert (made["license"], made["license_name"]) == ("other", "qwen")
    assert made["license_link"].endswith(f"owner/base/blob/{commit}/LICENSE")
    assert {"vlmbuild", "trainable", "nf4", "qwen2_vl"} <= set(made["tags"])
    for fact in (commit, manifest.id, manifest.root_digest, *(entry.digest for entry in manifest.files)):
        assert fact in text
    for fact in (f'load("{REPO}", expected_id=', "AutoModelForImageTextToText", f"vlmbuild verify {REPO} --id"):
        assert fact in text
    assert "vllm" not in text  # it reads no bitsandbytes weights


def test_a_card_of_the_user_is_taken(run, hub, nf4, tmp_path):
    artifact = shutil.copytree(nf4, tmp_path / "art")
    (artifact / "README.md").write_text("My own.\n")
    run("push", artifact, REPO)
    assert hub.files(REPO)["README.md"] == b"My own.\n"


def test_a_base_model_for_an_artifact_of_an_artifact(run, hub, nf4):
    options = (nf4, REPO, "--dry-run", "--json", "--base-model")
    made = header(json.loads(run("push", *options, "owner/base")[1])["card"])
    assert made["base_model"] == "owner/base"
    code, _, err = run("push", *options, "base")
    assert code == 2 and "'base'" in err


def test_a_server_without_xet_storage(run, hub, nf4, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    code, _, err = run("push", nf4, REPO)
    assert code == 1 and "HF_HUB_DISABLE_XET=1" in err
    assert hub.files(REPO).keys() == {".gitattributes"}
