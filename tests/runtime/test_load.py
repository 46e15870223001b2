"""Loading: verified files only, devices and dtypes, programs and weights that do not belong together."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from parity import assert_close
from tiny import ATTENDED, BATCH, LABELS

import vlmbuild
from vlmbuild import load
from vlmbuild.artifact.manifest import canonical_json
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import DeviceError, IncompatibleError, IntegrityError, UsageError
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


def test_a_directory_that_is_replaced_is_read_again(spoilt, plain, tmp_path, monkeypatch):
    """Another artifact takes its place between the manifest and the files."""
    other, opened = shutil.copytree(plain.path, tmp_path / "other"), []

    def replaced(path, **options):
        found = reader(path, **options)
        if not opened:
            spoilt.rename(tmp_path / "old")
            other.rename(spoilt)
        opened.append(path)
        return found

    reader = loading.ArtifactReader
    monkeypatch.setattr(loading, "ArtifactReader", replaced)
    model, _ = load(spoilt)
    assert len(opened) == 2
    assert not any("absmax" in name for name in model.state_dict())
    flip(spoilt / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        load(spoilt)
    assert len(opened) == 3  # it stayed where it was


def test_not_a_directory(tmp_path):
    with pytest.raises(vlmbuild.VlmbuildError, match="nothing-here"):
        load(tmp_path / "nothing-here")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:99"}, DeviceError, "not available here"),
        ({"device": "teapot"}, DeviceError, "not available here"),
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
    with ArtifactWriter(target) as writer:
        for file in sorted(path for path in artifact.rglob("*") if path.is_file()):
            name = str(file.relative_to(artifact))
            if name in ("manifest.json", "SHA256SUMS"):
                continue
            role = "graph" if name.startswith("graph") else "weights" if "safetensors" in name else "config"
            data = canonical_json(program) if name == "graph/program.json" else file.read_bytes()
            writer.write(name, data, role)
        writer.publish(name="changed", target="trainable", recipe={"dtype": "float32"})
    return target


def region(program, name):
    return next(entry for entry in program["regions"] if entry["name"] == name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["regions"][0]["nodes"][0].update(op="os.system"), "os.system"),
        (lambda p: p.update(family="other"), "Unknown model family 'other'"),
        (lambda p: p["regions"][0]["slots"][0].update(shape=[1, 2]), r"\[?\(?1, 2"),
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
        writer.publish(name="m", target="gguf")
    with pytest.raises(IncompatibleError, match="target 'gguf'"):
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
