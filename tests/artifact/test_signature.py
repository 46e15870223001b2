"""Signatures by OpenSSF model signing, made and checked with the package itself, where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub
from republish import republish

import vlmbuild
from vlmbuild.artifact import signature

ARTIFACT = Path(__file__).parents[2] / "artifacts/prebuilt/qwen2-vl-digits-nf4"

ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec", reason="makes the keys")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")


@pytest.fixture(autouse=True)
def package(request):
    if "absent" not in request.node.name:
        pytest.importorskip("model_signing", reason="signs: pip install 'vlmbuild[sign]'")


@pytest.fixture
def artifact(tmp_path):
    return shutil.copytree(ARTIFACT, tmp_path / "art")


def keys(folder, name="key", curve=None):
    """Write a pair of keys; returns the private one and the public one."""
    private = ec.generate_private_key(curve or ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / f"{name}.pem").write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem", folder / f"{name}.pub"


def test_a_signed_artifact(run, artifact, tmp_path, monkeypatch):
    private, public = keys(tmp_path)
    code, out, err = run("sign", artifact, "--private-key", private, "--json")
    assert code == 0, err
    manifest = vlmbuild.verify(artifact)  # the signature is no extra file
    assert json.loads(out)["id"] == manifest.id and {path.name for path in tmp_path.iterdir()} == {
        "art",
        "key.pem",
        "key.pub",
    }
    code, out, err = run("verify", artifact, "--public-key", public)
    assert code == 0 and f"owner of {public}" in out, err
    (artifact / "README.md").write_text("A card.")  # signed or not, it says nothing about the files
    assert run("verify", artifact, "--public-key", public)[0] == 0
    run("sign", artifact, "--private-key", private)  # again
    with fake_hub(monkeypatch, tmp_path / "hub"):
        run("push", artifact, "owner/name")
        code, out, err = run("verify", "owner/name", "--public-key", public, "--id", manifest.id)
        assert code == 0, err


def test_the_packages_own_command_agrees(run, artifact, tmp_path):
    private, public = keys(tmp_path)
    file, tool = artifact / "model.sig", [sys.executable, "-m", "model_signing"]
    run("sign", artifact, "--private-key", private)
    (artifact / "README.md").write_text("A card.")
    theirs = ["verify", "key", artifact, "--public_key", public, "--signature", file]
    assert subprocess.run([*tool, *theirs], capture_output=True, check=False).returncode == 0
    file.unlink()
    options = ["--private_key", private, "--signature", file, "--ignore-paths", artifact / "README.md"]
    subprocess.run([*tool, "sign", "key", artifact, *options], capture_output=True, check=True)
    code, _, err = run("verify", artifact, "--public-key", public)
    assert code == 0, err


def test_what_a_signature_refuses(run, artifact, tmp_path):
    private, public = keys(tmp_path)
    _, another = keys(tmp_path, "another")
    code, _, err = run("verify", artifact, "--public-key", public)
    assert code == 3 and "vlmbuild sign" in err
    run("sign", artifact, "--private-key", private)
    code, _, err = run("verify", artifact, "--public-key", another)
    assert code == 3 and "model.sig" in err and str(another) in err
    data = bytearray((artifact / "model.safetensors").read_bytes())
    data[-1] ^= 1
    changed = republish(artifact, tmp_path / "changed", {"model.safetensors": bytes(data)})
    shutil.copy(artifact / "model.sig", changed)
    assert vlmbuild.verify(changed)  # a forger writes a manifest too
    code, _, err = run("verify", changed, "--public-key", public)
    assert code == 3 and "model.safetensors" in err and "model.sig" in err
    (artifact / "model.safetensors").write_bytes(data)
    code, _, err = run("verify", artifact, "--public-key", public)
    assert code == 3 and "model.safetensors" in err
    code, _, err = run("sign", artifact, "--private-key", private)
    assert code == 3 and "model.safetensors" in err


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"mediaType": 1}', "\x00"])
def test_what_is_no_signature(run, artifact, tmp_path, text):
    (artifact / "model.sig").write_text(text)
    code, _, err = run("verify", artifact, "--public-key", keys(tmp_path)[1])
    assert code == 3 and "model.sig" in err


def test_what_is_no_key(run, artifact, tmp_path):
    (tmp_path / "text").write_text("no key")
    _, odd = keys(tmp_path, "odd", ec.SECP256K1())
    run("sign", artifact, "--private-key", keys(tmp_path)[0])
    for key in (tmp_path / "text", odd):
        code, _, err = run("verify", artifact, "--public-key", key)
        assert code == 2 and str(key) in err and "openssl" in err
    private = ec.generate_private_key(ec.SECP256R1())
    hidden = serialization.BestAvailableEncryption(b"secret")
    locked = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    (tmp_path / "locked.pem").write_bytes(locked)
    code, _, err = run("sign", artifact, "--private-key", tmp_path / "locked.pem")
    assert code == 2 and "locked.pem" in err and "unencrypted" in err
    assert run("sign", artifact, "--private-key", tmp_path / "no.pem")[0] == 2


def test_the_package_is_absent(run, artifact, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    private, public = keys(tmp_path)
    for command in (("sign", artifact, "--private-key", private), ("verify", artifact, "--public-key", public)):
        code, _, err = run(*command)
        assert code == 2 and "vlmbuild[sign]" in err
    assert signature.SIGNATURE not in {path.name for path in artifact.iterdir()}
