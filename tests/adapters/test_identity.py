"""Adapters know the base that they were trained on: other weights or another processor are refused, by name."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import peft
import pytest
from adapters import edit_adapter, write_adapter
from republish import republish
from safetensors.torch import load_file, save

import vlmbuild
from vlmbuild.adapters.identity import BASE_FILE, Base, check_base, read_base
from vlmbuild.adapters.peft_files import WEIGHTS_FILE
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.errors import SourceError


@pytest.fixture(scope="module")
def adapter(nf4, tmp_path_factory):
    return write_adapter(nf4.path, tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture
def copy(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "adapter")


def of_checkpoint(source, **options):
    checkpoint = Checkpoint.open(source, **options)
    with checkpoint.hashing() as digests:
        return checkpoint.base(digests)


def test_it_names_artifact_weights_and_processor(adapter, nf4):
    trained = read_base(adapter, WEIGHTS_FILE)
    assert trained == Base.of_manifest(nf4.manifest)
    values = json.loads((adapter / BASE_FILE).read_text())
    assert values["artifact"] == nf4.manifest.id and len(values["weights"]) == len(values["processors"]) == 2


def test_peft_does_not_see_it(adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peft.PeftConfig.from_pretrained(adapter).r == 4


def test_the_same_source_in_any_format_is_the_same_base(adapter, nf4, plain, checkpoint):
    trained = read_base(adapter, WEIGHTS_FILE)
    for base in (Base.of_manifest(plain.manifest), of_checkpoint(checkpoint), of_checkpoint(nf4.path)):
        check_base(adapter, trained, base)
    model, _ = vlmbuild.load(plain.path)
    vlmbuild.load_adapter(model, adapter)
    assert model.adapter is not None


def test_what_is_built_from_the_artifact_is_the_same_base(adapter, nf4):
    files = [{"path": entry.path, "digest": entry.digest, "size": entry.size} for entry in nf4.manifest.files]
    source = ({"uri": "directory", "files": files},)
    files = tuple(replace(entry, digest="0" * 64) for entry in nf4.manifest.files)
    check_base(
        adapter, read_base(adapter, WEIGHTS_FILE), Base.of_manifest(replace(nf4.manifest, files=files, source=source))
    )


def test_a_merged_adapter_makes_another_base(adapter, nf4):
    record = {"uri": "adapter", "files": [{"path": WEIGHTS_FILE, "digest": "1" * 64, "size": 1}]}
    files = tuple(replace(entry, digest="0" * 64) for entry in nf4.manifest.files)
    merged = replace(nf4.manifest, files=files, source=(*nf4.manifest.source, record))
    with pytest.raises(SourceError, match=merged.id):
        check_base(adapter, read_base(adapter, WEIGHTS_FILE), Base.of_manifest(merged))


@pytest.fixture(scope="module")
def other(nf4, tmp_path_factory):
    """An artifact with the same graph, of another source."""
    files = [{**file, "digest": "2" * 64} for file in nf4.manifest.source[0]["files"]]
    weights = load_file(nf4.path / "model.safetensors")
    weights = {name: tensor + 0.1 if "norm" in name else tensor for name, tensor in weights.items()}
    folder = tmp_path_factory.mktemp("other") / "artifact"
    changes = {"model.safetensors": save(weights, {"format": "pt"})}
    return republish(nf4.path, folder, changes, source=[{"uri": "directory", "files": files}])


def test_another_base_is_refused_with_both_ids(adapter, nf4, other):
    model, _ = vlmbuild.load(other)
    with pytest.raises(SourceError) as refused:
        vlmbuild.load_adapter(model, adapter)
    for fact in (nf4.manifest.id, vlmbuild.verify(other).id, "allow_other_base=True", str(adapter)):
        assert fact in str(refused.value)
    assert model.adapter is None
    vlmbuild.load_adapter(model, adapter, allow_other_base=True)
    assert model.adapter is not None


def test_build_refuses_it_too(run, adapter, nf4, other, tmp_path):
    options = ("build", other, "--adapter", adapter, "-o", tmp_path / "out")
    code, _, err = run(*options)
    assert code == 1 and nf4.manifest.id in err and "--allow-other-base" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(*options, "--allow-other-base")
    assert code == 0, err


def test_another_processor_is_refused(adapter, nf4, tmp_path):
    template = (nf4.path / "chat_template.jinja").read_bytes() + b"\n"
    changed = republish(nf4.path, tmp_path / "art", {"chat_template.jinja": template}, source=[])
    with pytest.raises(SourceError, match=r"processor sha256:.*processor sha256:"):
        vlmbuild.load_adapter(vlmbuild.load(changed)[0], adapter)
    trained = read_base(adapter, WEIGHTS_FILE)
    with pytest.raises(SourceError, match="processor"):
        check_base(adapter, trained, of_checkpoint(nf4.path, processor=changed))


def test_adapters_of_others_load_as_before(copy, nf4, other):
    edit_adapter(copy, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})  # written over ours
    vlmbuild.load_adapter(vlmbuild.load(other)[0], copy)
    (copy / BASE_FILE).unlink()
    vlmbuild.load_adapter(vlmbuild.load(other)[0], copy)


@pytest.mark.parametrize("change", ["[]", "{}", {"adapter": 1}, {"artifact": 1}, {"weights": "a"}, {"processors": [1]}])
def test_a_malformed_file_is_named(copy, change):
    file = copy / BASE_FILE
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    if change == {"adapter": 1}:  # of other tensors
        assert read_base(copy, WEIGHTS_FILE) is None
        return
    with pytest.raises(SourceError, match=BASE_FILE):
        read_base(copy, WEIGHTS_FILE)


def test_merged_weights_are_no_artifacts(plain, copy, tmp_path):
    model, _ = vlmbuild.load(plain.path)
    vlmbuild.load_adapter(model, copy)
    model.merge_and_unload()
    vlmbuild.add_lora(model, r=2)
    vlmbuild.save_adapter(model, copy)  # over one that names a base
    assert not (copy / BASE_FILE).exists()
