"""Several adapters in one model: each computes as if it were alone, as PEFT's do."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from adapters import write_adapter
from parity import MODEL_FP32, assert_close
from tiny import ATTENDED, BATCH, LABELS
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.errors import UsageError

KINDS = {"a": {"r": 4, "target": ["q_proj", "v_proj"]}, "b": {"r": 2, "layers": [1], "dropout": 0.5, "vision": True}}
"""Adapters of other ranks, layers and dropout."""


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits[ATTENDED].float()


@pytest.fixture(scope="module")
def directories(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(plain.path, folder / name, **options) for name, options in KINDS.items()}


@pytest.fixture(scope="module")
def loaded(plain, directories):
    model, _ = vlmbuild.load(plain.path)
    for name, directory in directories.items():
        vlmbuild.load_adapter(model, directory, adapter_name=name)
    return model


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def expected(plain, directories):
    """Logits with each adapter alone, and without any."""
    found = {None: logits(vlmbuild.load(plain.path)[0])}
    for name, directory in directories.items():
        alone, _ = vlmbuild.load(plain.path)
        vlmbuild.load_adapter(alone, directory)
        found[name] = logits(alone)
    return found


def test_each_computes_as_if_alone_and_as_pefts(model, plain, directories, expected):
    assert model.active_adapter == "b" and model.adapter_names == ("b", "a")
    base = AutoModelForImageTextToText.from_pretrained(plain.path, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, directories["a"], adapter_name="a")
    theirs.load_adapter(directories["b"], adapter_name="b")
    for name in ("b", "a", "a", "b"):
        model.set_adapter(name)
        theirs.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        assert_close(logits(theirs), expected[name], MODEL_FP32)
        with model.disable_adapter():
            assert_close(logits(model), expected[None], MODEL_FP32)
    assert not torch.allclose(expected["a"], expected["b"])


def test_one_trains_and_is_saved_and_the_others_wait(model, expected, plain, tmp_path):
    model.set_adapter("a")
    optimizer = torch.optim.SGD([parameter for _, parameter in model.trainable_parameters()], lr=0.5)
    names = {name for name, _ in model.trainable_parameters()}
    model.set_adapter("b")
    assert {name for name, _ in model.trainable_parameters()} != names
    model.set_adapter("a")
    assert {name for name, _ in model.trainable_parameters()} == names
    model.train()(**BATCH, labels=LABELS).loss.backward()
    optimizer.step()
    trained = logits(model)
    assert not torch.allclose(trained, expected["a"])
    vlmbuild.save_adapter(model, tmp_path)
    again, _ = vlmbuild.load(plain.path)
    vlmbuild.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), trained)
    model.set_adapter("b")
    assert torch.equal(logits(model), expected["b"])
    model = pickle.loads(pickle.dumps(model))
    model.set_adapter("a")
    assert torch.equal(logits(model), trained)


def test_a_dtype_reaches_those_that_wait(model, expected):
    model.to(torch.bfloat16).float()
    model.set_adapter("a")
    assert model.dtype == torch.float32 and not torch.equal(logits(model), expected["a"])
    assert_close(logits(model), expected["a"], 0.05)


def test_deleting_and_merging(model, expected):
    model.delete_adapter("b")
    assert model.active_adapter is None and model.adapter_names == ("a",)
    assert torch.equal(logits(model), expected[None])
    assert not any("lora" in name for name in model.state_dict())
    model.set_adapter("a")
    vlmbuild.add_lora(model, r=2, adapter_name="c")
    assert_close(logits(model), expected[None], MODEL_FP32)
    model.set_adapter("a")
    model.merge_and_unload()
    assert model.adapter_names == ()
    assert_close(logits(model), expected["a"], MODEL_FP32)


def test_names_and_modules_that_do_not_fit(model, plain, directories):
    with pytest.raises(UsageError, match=r"no adapter 'x'.*b, a.*adapter_name='x'"):
        model.set_adapter("x")
    with pytest.raises(UsageError, match="no adapter 'x'"):
        model.delete_adapter("x")
    with pytest.raises(UsageError, match="has an adapter 'a' already"):
        vlmbuild.load_adapter(model, directories["a"], adapter_name="a")
    with pytest.raises(UsageError, match=r"embed_tokens is trained whole.*delete_adapter\('b'\)"):
        vlmbuild.add_lora(model, modules_to_save=["embed_tokens"], adapter_name="c")
    assert model.adapter_names == ("b", "a")
    whole, _ = vlmbuild.load(plain.path)
    vlmbuild.add_lora(whole, r=2, modules_to_save=["embed_tokens"])
    with pytest.raises(UsageError, match="embed_tokens was trained whole"):
        vlmbuild.load_adapter(whole, directories["a"], adapter_name="a")
    assert whole.adapter_names == ("default",)
