"""Directories that are no checkpoint, or hold more than one: each says how to make one of it."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import write_adapter
from checkpoints import as_shards, copied, edit_weights
from safetensors.torch import load_file, save_file

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.builder.build import build
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.errors import SourceError
from vlmbuild.recipe import Recipe


def prefixed(directory, prefix):
    save_file(
        {prefix + name: tensor for name, tensor in load_file(directory / "model.safetensors").items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "any.thing."])
def test_a_prefix_of_all_names_is_stripped_on_request(prefix, checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    prefixed(source, prefix)
    with pytest.raises(SourceError, match=rf"begin with '{prefix}'.*--strip-prefix {prefix}$"):
        build(source, tmp_path / "out")
    assert Checkpoint.open(source, strip_prefix=prefix).tensors.keys() == Checkpoint.open(checkpoint).tensors.keys()
    with pytest.raises(SourceError, match="Drop --strip-prefix"):
        build(checkpoint, tmp_path / "out", strip_prefix=prefix)


def test_weights_with_a_prefix_are_the_same_artifact(run, plain, checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    prefixed(source, "module.")
    code, *_ = run("build", source, "-o", tmp_path / "out", "--dtype", "float32", "--strip-prefix", "module.")
    assert code == 0
    written = CheckpointWeights(tmp_path / "out")
    assert all(torch.equal(written.read(name), CheckpointWeights(plain.path).read(name)) for name in written.tensors)


def test_an_adapter_is_no_model(run, nf4, checkpoint, tmp_path):
    adapter = write_adapter(nf4.path, tmp_path / "adapter")
    for command in ("plan", "build", "lock"):
        code, _, err = run(command, adapter, *(() if command == "plan" else ("-o", tmp_path / "out")))
        assert code == 1 and f"--adapter {adapter}" in err
    with pytest.raises(SourceError, match=rf"is an adapter.*{nf4.path}.*--adapter {adapter}"):
        build(adapter, tmp_path / "out", Recipe(dtype="float32"))
    both = copied(checkpoint, tmp_path / "both")
    (both / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(SourceError, match="a model and an adapter.*--adapter"):
        build(both, tmp_path / "out")


def empty(directory, *names):
    (directory / "model.safetensors").unlink()
    for name in names:
        (directory / name).write_bytes(b"")


def both_layouts(directory):
    data = (directory / "model.safetensors").read_bytes()
    as_shards(directory)
    (directory / "model.safetensors").write_bytes(data)


def old_shard(directory):
    as_shards(directory)
    (directory / "model-00001-of-00003.safetensors").write_bytes(b"")


def no_index(directory):
    as_shards(directory)
    (directory / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (both_layouts, r"two sets of weights, model.safetensors and .*index.json.*Move"),
        (old_shard, r"two sets of weights: model-00001-of-00003.safetensors"),
        (no_index, r"shards \(model-00001-of-00002.safetensors, .*\) without .*index.json.*Download"),
        (
            lambda d: empty(d, "consolidated.safetensors"),
            r"but consolidated.safetensors.*rename it to model.safetensors",
        ),
        (lambda d: empty(d, "zero_to_fp32.py", "latest"), r"DeepSpeed.*zero_to_fp32.py . OUT --safe_serialization"),
        (lambda d: empty(d, "__0_0.distcp", ".metadata"), r"FSDP.*accelerate merge-weights"),
        (lambda d: edit_weights(d, lambda t: t.update(x=torch.ones(1))), r"holds x, which a model"),
    ],
)
def test_other_sets_of_weights_are_named(spoil, message, checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    spoil(source)
    with pytest.raises(SourceError, match=f"(?s){message}"):
        build(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_template_in_the_tokenizers_config_alone_is_used(checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    file = source / "tokenizer_config.json"
    template = (source / "chat_template.jinja").read_text()
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    (source / "chat_template.jinja").unlink()
    assert Checkpoint.open(source).processor.chat_template == template
