"""Loading: verified files only, devices and dtypes, programs and weights that do not belong together."""

from __future__ import annotations

import json
import os
import shutil
import threading

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from parity import assert_close
from republish import republish
from tiny import ATTENDED, BATCH, LABELS

import vlmbuild
from vlmbuild import load
from vlmbuild.artifact import comparison
from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import DeviceError, IncompatibleError, IntegrityError, SourceError, UsageError
from vlmbuild.runtime import load as loading


@pytest.fixture
def spoilt(nf4, tmp_path):
    return shutil.copytree(nf4.path, tmp_path / "artifact")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: flip(d / "model.safetensors"), "model.safetensors"),
        (lambda d: (d / "extra.py").write_text("x"), "extra.py"),
    ],
)
def test_changed_artifacts_are_refused(spoilt, spoil, message):
    spoil(spoilt)
    with pytest.raises(IntegrityError, match=message):
        load(spoilt)


def test_not_a_directory(tmp_path):
    with pytest.raises(vlmbuild.VlmbuildError, match="nothing-here"):
        load(tmp_path / "nothing-here")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:99"}, DeviceError, "not available here"),
        ({"device": "gpu"}, DeviceError, "'gpu' names no device.*'cpu' or 'cuda'"),
        ({"device": 1.5}, DeviceError, "1.5 names no device"),
        ({"dtype": "int8"}, UsageError, "dtype cannot be 'int8'"),
        ({"dtype": torch.float64}, UsageError, "dtype cannot be 'float64'"),
    ],
)
def test_what_this_machine_does_not_have(nf4, options, error, message):
    with pytest.raises(error, match=message):
        load(nf4.path, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_another_compute_dtype(nf4, dtype):
    model, _ = load(nf4.path, dtype=dtype)
    exact, _ = load(nf4.path)
    assert model.dtype == torch.bfloat16
    assert model.get_buffer("model.language_model.layers.0.self_attn.q_proj.weight").dtype == torch.uint8
    with torch.no_grad():
        logits = [each(**BATCH).logits[ATTENDED].float() for each in (model, exact)]
    assert_close(*logits, 0.1)


def rewritten(artifact, target, change):
    """Write an artifact that verifies, with another program."""
    program = json.loads((artifact / "graph/program.json").read_text())
    change(program)
    return republish(artifact, target, {"graph/program.json": canonical_json(program)})


def region(program, name):
    return next(entry for entry in program["regions"] if entry["name"] == name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["regions"][0]["nodes"][0].update(op="os.system"), "os.system"),
        (lambda p: p.update(family="other"), "Unknown model family 'other'"),
        (
            lambda p: p["regions"][0]["slots"][0].update(shape=[1, 2]),
            "cannot run: variant 'image': Invalid channel dimensions",
        ),
        (
            lambda p: region(p, "language_model.layers")["recipes"][0]["format"].update(blocksize=128),
            "blocks of 64.*blocks of 128",
        ),
    ],
)
def test_program_and_weights_must_belong_together(nf4, tmp_path, change, message):
    with pytest.raises(IncompatibleError, match=f"(?s){message}"):
        load(rewritten(nf4.path, tmp_path / "out", change))


def test_other_targets_are_refused(tmp_path):
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.write("config.json", b"{}", "config")
        writer.publish(name="m", target="mlx")
    with pytest.raises(IncompatibleError, match="target 'mlx'"):
        load(tmp_path / "out")


def test_training_on_four_bits_leaves_the_base_alone(nf4):
    torch.manual_seed(0)
    model, _ = load(nf4.path)
    vlmbuild.add_lora(model, r=8)
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**BATCH, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_quantized_state_dict_round_trips(nf4):
    model, _ = load(nf4.path)
    other, _ = load(nf4.path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(**BATCH).logits, model(**BATCH).logits)


def weights_of(artifact, change):
    """The artifact's weights with a change, as bytes."""
    tensors = safetensors.torch.load_file(artifact / "model.safetensors")
    change(tensors)
    return {"model.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"})}


def as_dtype(ending, dtype):
    def change(tensors):
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = tensors[name].to(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"model.more.weight": torch.zeros(2)}), "hold model.more.weight, which its program"),
        (as_dtype("norm.weight", torch.int32), "norm.weight.* is stored as int32, .* needs float32"),
        (as_dtype("norm.weight", torch.float16), "norm.weight.* is stored as float16, .* needs float32"),
        (as_dtype("q_proj.weight", torch.int8), "q_proj.weight.* is stored as int8, .* needs uint8"),
        (as_dtype("absmax", torch.int16), "absmax.* is stored as int16"),
        (lambda t: t.pop(next(name for name in t if name.endswith("norm.weight"))), "norm.weight"),
    ],
)
def test_tensors_are_exactly_those_of_the_program(nf4, tmp_path, change, message):
    with pytest.raises(IncompatibleError, match=message):
        load(republish(nf4.path, tmp_path / "changed", weights_of(nf4.path, change)))


def test_a_pinned_id(nf4, tmp_path):
    artifact_id = nf4.manifest.id
    model, _ = load(nf4.path, expected_id=artifact_id)
    assert model.artifact_id == artifact_id
    other = republish(nf4.path, tmp_path / "other", {"graph/program.txt": b"another"})
    for verified in (True, False):
        with pytest.raises(IntegrityError, match=f"expected {artifact_id}, found sha256:"):
            load(other, expected_id=artifact_id, verify=verified)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        load(nf4.path, expected_id=artifact_id[:20])


def test_what_is_hashed_is_what_is_loaded(nf4, spoilt, tmp_path, monkeypatch):
    """Other weights while they are mapped, the right ones before they are hashed."""
    right = shutil.copy(spoilt / "model.safetensors", tmp_path / "right")
    tensors = safetensors.torch.load_file(right)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] += 777
    safetensors.torch.save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    (spoilt / "model.safetensors").write_bytes(
        (spoilt / "model.safetensors").read_bytes()[: os.path.getsize(right)].ljust(os.path.getsize(right), b"\0")
    )
    bound, hash_descriptor, bind = threading.Event(), comparison.hash_descriptor, loading.bind_artifact

    def late_hash(descriptor, **options):
        bound.wait()
        return hash_descriptor(descriptor, **options)

    def bind_and_replace(*arguments):
        try:
            return bind(*arguments)
        finally:
            os.replace(right, spoilt / "model.safetensors")
            bound.set()

    monkeypatch.setattr(comparison, "hash_descriptor", late_hash)
    monkeypatch.setattr(loading, "bind_artifact", bind_and_replace)
    with pytest.raises(IntegrityError, match="changed: model.safetensors"):
        load(spoilt)


def test_processor_files_are_those_that_were_verified(nf4, spoilt, monkeypatch):
    """Other files under their names, for as long as the processor is loaded."""
    family = type(load(nf4.path)[0].family)
    load_processor = family.load_processor

    def replace_and_load(self, directory):
        os.rename(spoilt, f"{spoilt}.away")
        shutil.copytree(f"{spoilt}.away", spoilt)
        (spoilt / "tokenizer_config.json").write_text('{"pad_token": "!"}')
        try:
            return load_processor(self, directory)
        finally:
            shutil.rmtree(spoilt)
            os.rename(f"{spoilt}.away", spoilt)

    monkeypatch.setattr(family, "load_processor", replace_and_load)
    _, processor = load(spoilt)
    assert processor.tokenizer.pad_token != "!"
    assert processor.tokenizer.name_or_path == str(spoilt)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pipes_do_not_hang(spoilt, name, verify):
    (spoilt / name).unlink()
    os.mkfifo(spoilt / name)
    with pytest.raises(IntegrityError, match=name):
        load(spoilt, verify=verify)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "graph/program.json"])
def test_sizes_are_compared_before_anything_is_read(spoilt, name, monkeypatch):
    os.truncate(spoilt / name, 6 * 2**30)
    monkeypatch.setattr(loading, "bind_artifact", None)
    with pytest.raises(IntegrityError, match=f"too long: {name}"):
        load(spoilt)


def test_hard_links_are_refused_unless_allowed(spoilt, tmp_path):
    os.link(spoilt / "model.safetensors", tmp_path / "mine")
    with pytest.raises(IntegrityError, match="hard links: model.safetensors.*allow_hardlinks=True"):
        load(spoilt)
    load(spoilt, allow_hardlinks=True)


def test_an_artifact_that_is_overwritten_while_it_is_loaded(nf4, tmp_path, monkeypatch):
    """Files already open keep the old content; a load that finds the directory replaced starts again on the new artifact."""
    path = republish(nf4.path, tmp_path / "art", {})
    bind, overwritten = loading.bind_artifact, []

    def overwrite():
        if not overwritten:
            overwritten.append(True)
            republish(nf4.path, path, {"graph/program.txt": b"new"}, overwrite=True)

    def bind_late(*arguments):
        overwrite()
        return bind(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "bind_artifact", bind_late)
        model, _ = load(path)
        assert model.artifact_id == nf4.manifest.id
    overwritten.clear()
    path = republish(nf4.path, path, {}, overwrite=True)
    list_tree = comparison.list_tree

    def list_late(*arguments, **options):
        overwrite()
        return list_tree(*arguments, **options)

    monkeypatch.setattr(comparison, "list_tree", list_late)
    new = load(path)[0].artifact_id
    assert new != nf4.manifest.id
    assert vlmbuild.verify(path).id == new


def test_a_hub_id(nf4, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub/models--owner--name/snapshots" / ("0" * 40)
    shutil.copytree(nf4.path, snapshot)
    (tmp_path / "hub/models--owner--name/refs").mkdir()
    (tmp_path / "hub/models--owner--name/refs/v1").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, _ = load("owner/name", revision="v1")
    assert model.source == "owner/name@v1"
    assert (model.artifact_id, model.path) == (nf4.manifest.id, snapshot)
    with pytest.raises(SourceError, match="owner/name"):
        load("owner/name", revision="v2")
    with pytest.raises(UsageError, match="has no revision 'v1'"):
        load(nf4.path, revision="v1")
