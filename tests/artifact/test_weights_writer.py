"""Writing weights: what safetensors and transformers open, in any order, reproducible, bounded memory."""

from __future__ import annotations

import hashlib
import json
import resource

import pytest
import safetensors
import torch

from vlmbuild.artifact.reader import verify
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.artifact.weights_writer import TensorSpec, WeightsWriter
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import OutputError

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "w": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    "h": torch.arange(5).bfloat16(),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "mask": torch.tensor([True, False]),
    "f8": torch.ones(3).to(torch.float8_e4m3fn),
}


def specs_of(tensors):
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(output, tensors=TENSORS, *, specs=None, shard_bytes=2**30, order=None):
    with ArtifactWriter(output) as writer:
        with WeightsWriter(writer, specs or specs_of(tensors), shard_bytes=shard_bytes) as weights:
            for name in order or tensors:
                weights.add(name, tensors[name])
        return writer.publish(name="m", target="trainable")


def check(output, tensors=TENSORS):
    weights = CheckpointWeights(output)
    assert set(weights.tensors) == set(tensors)
    opened = {}
    for file in weights.files:
        with safetensors.safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            opened |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    for name, tensor in tensors.items():
        for read in (weights.read(name), opened[name]):
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    return weights


def test_single_file_is_aligned(tmp_path):
    write(tmp_path / "art")
    weights = check(tmp_path / "art")
    assert [file.name for file in weights.files] == ["model.safetensors"]
    assert all(info.start % info.dtype.itemsize == 0 for info in weights.tensors.values())


def test_shards_and_index(tmp_path):
    write(tmp_path / "art", shard_bytes=100)
    weights = check(tmp_path / "art")
    assert [file.name for file in weights.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    index = json.loads((tmp_path / "art/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.numel() * t.dtype.itemsize for t in TENSORS.values())}
    assert list(index["weight_map"]) == sorted(TENSORS)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    write(tmp_path / "art", shard_bytes=1)
    assert len(check(tmp_path / "art").files) == len(TENSORS)


@pytest.mark.parametrize("shard_bytes", [2**30, 100, 1])
def test_the_order_of_adding_does_not_matter(tmp_path, shard_bytes):
    one = write(tmp_path / "one", shard_bytes=shard_bytes)
    two = write(tmp_path / "two", shard_bytes=shard_bytes, order=list(TENSORS)[::-1])
    assert one.id == two.id


def test_sizes_not_known_beforehand(tmp_path):
    tensors = {"text": torch.arange(7, dtype=torch.uint8), **TENSORS, "note": torch.arange(11, dtype=torch.uint8)}
    specs = [
        TensorSpec(spec.name, spec.dtype, (200,), exact=False) if spec.name in ("text", "note") else spec
        for spec in specs_of(tensors)
    ]
    for name, shard_bytes in (("art", 2**30), ("shards", 300)):
        manifest = write(tmp_path / name, tensors, specs=specs, shard_bytes=shard_bytes)
        check(tmp_path / name, tensors)
        other = write(tmp_path / f"{name}2", tensors, specs=specs, shard_bytes=shard_bytes, order=sorted(tensors))
        assert other.id == manifest.id
    assert list(CheckpointWeights(tmp_path / "art").tensors)[-2:] == ["text", "note"]


def test_entries_match_the_files(tmp_path):
    manifest = write(tmp_path / "art")
    entry = manifest.entry("model.safetensors")
    assert entry.role == "weights"
    assert entry.digest == hashlib.sha256((tmp_path / "art/model.safetensors").read_bytes()).hexdigest()
    assert verify(tmp_path / "art") == manifest


def test_views_and_parameters(tmp_path):
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "p": torch.nn.Parameter(torch.ones(2))}
    write(tmp_path / "art", tensors)
    check(tmp_path / "art", tensors)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda weights: weights.add("x", TENSORS["w"]), "'x' is not among those announced for .*art"),
        (lambda weights: [weights.add("w", TENSORS["w"]) for _ in range(2)], "'w' is written twice"),
        (lambda weights: weights.add("w", TENSORS["w"].double()), r"'w' is torch.float64 \(4, 6\), but torch.float32"),
        (lambda weights: weights.add("w", TENSORS["w"].T), r"'w' is torch.float32 \(6, 4\), but"),
        (lambda weights: weights.add("n", torch.zeros(4, dtype=torch.uint8)), r"'n' is torch.uint8 \(4,\), but"),
        (lambda weights: weights.finish(), "never written: empty, f8, h, mask, n, odd, scalar, w"),
    ],
)
def test_misuse(tmp_path, action, words):
    specs = [*specs_of(TENSORS), TensorSpec("n", torch.uint8, (3,), exact=False)]
    with (
        pytest.raises(OutputError, match=words),
        ArtifactWriter(tmp_path / "art") as writer,
        WeightsWriter(writer, specs) as weights,
    ):
        action(weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], "no weights to write"),
        ([TensorSpec("a", torch.float32, (1,))] * 2, "Tensors announced twice: a. Give each"),
        ([TensorSpec("a", torch.complex128, (1,))], "'a' with torch.complex128 cannot be stored"),
        ([TensorSpec("__metadata__", torch.float32, (1,))], "'__metadata__' with .* cannot be stored"),
    ],
)
def test_impossible_specs(tmp_path, specs, words):
    with ArtifactWriter(tmp_path / "art") as writer, pytest.raises(OutputError, match=words):
        WeightsWriter(writer, specs)


def test_a_failing_source_leaves_nothing(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        ArtifactWriter(tmp_path / "art") as writer,
        WeightsWriter(writer, specs_of(TENSORS)) as weights,
    ):
        weights.add("w", TENSORS["w"])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_model(tmp_path):
    count, size = 48, 4 * 2**20
    names = [f"layer.{number}" for number in range(count)]
    specs = [TensorSpec(name, torch.uint8, (size,)) for name in names]
    with ArtifactWriter(tmp_path / "art") as writer:
        with WeightsWriter(writer, specs) as weights:
            weights.add(names[0], torch.zeros(size, dtype=torch.uint8))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for name in names[1:]:
                weights.add(name, torch.zeros(size, dtype=torch.uint8))
        manifest = writer.publish(name="m", target="trainable")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < manifest.total_bytes / 4, grown
