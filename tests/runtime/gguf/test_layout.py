"""Tensors of every family: names that llama.cpp has, each once, and cuts that fit together again."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from setups import SETUPS

import vlmbuild
from vlmbuild.families import FAMILIES
from vlmbuild.families.gguf import GgufPart
from vlmbuild.families.traced import meta_module
from vlmbuild.ir.program import SourceWeight
from vlmbuild.runtime.gguf.layout import MODEL, TOWER, GgufTensor, gguf_tensors
from vlmbuild.targets.gguf.header import header

CONFIGS = Path(__file__).parents[2] / "configs"
# What llama.cpp has one value of, and tiny models another.
LLAMA_CPP = {
    "qwen2_5_vl": {"vision_config": {"window_size": 112, "fullatt_block_indexes": [1]}},
    "gemma3": {"text_config": {"query_pre_attn_scalar": 64}},
}
KNOWN = [name for name in SETUPS if name != "mllama"]


def model_of(name):
    """Return a family's tiny config as llama.cpp can compute it, and its description."""
    setup = SETUPS[name](False)
    values = {
        key: {**value, **LLAMA_CPP.get(name, {}).get(key, {})} if isinstance(value, dict) else value
        for key, value in setup.values.items()
    }
    config = setup.family.config(values)
    return setup, config, setup.family.gguf_model(config, setup.processor)


def weights_of(family, config):
    model = meta_module(family.model_class, config, "eager", torch.float32)
    ties = family.ties(config)
    return [
        SourceWeight(name, tuple(value.shape), None) for name, value in model.named_parameters() if name not in ties
    ]


@pytest.mark.parametrize("name", KNOWN)
def test_every_parameter_has_its_place(name):
    setup, config, model = model_of(name)
    weights = weights_of(setup.family, config)
    tensors = gguf_tensors(weights, setup.family, model)
    names = [(tensor.file, tensor.name) for tensor in tensors]
    assert len(set(names)) == len(names)
    known = {tensor.name for tensor in tensors if tensor.file == MODEL}
    assert {"token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight"} <= known
    assert {tensor.name for tensor in tensors if tensor.file == TOWER} >= {
        "v.patch_embd.weight",
        "v.blk.0.attn_out.weight",
    }
    for weight in weights:
        parameter = torch.randn(weight.shape)
        restored = torch.full(weight.shape, torch.nan)
        cuts = [tensor for tensor in tensors if tensor.parameter == weight.name and not tensor.part.copied]
        for tensor in cuts:
            values = tensor.cut(parameter, 0)
            assert tuple(values.shape) == tensor.shape
            tensor.restore(values, restored)
        assert torch.allclose(restored, parameter, atol=1e-6), weight.name


def test_chunks_of_rows_are_cut_alike():
    setup, config, model = model_of("qwen2_vl")
    tensors = gguf_tensors(weights_of(setup.family, config), setup.family, model)
    tensor = next(each for each in tensors if each.name == "v.blk.0.attn_k.weight")
    parameter = torch.randn(tensor.source_shape)
    whole = tensor.cut(parameter, 0)
    pieces = [tensor.cut(parameter[first : first + 7], first) for first in range(0, len(parameter), 7)]
    assert torch.equal(torch.cat(pieces), whole)


def test_rotated_halves_become_pairs():
    tensor = GgufTensor(MODEL, "w", (8, 1), "w", (8, 1), GgufPart("w", head_rows=4))
    assert tensor.cut(torch.arange(8.0).unsqueeze(1), 0).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("folder", sorted(path.name for path in CONFIGS.iterdir()))
def test_published_models_can_be_written(folder):
    values = json.loads((CONFIGS / folder / "config.json").read_text())
    family = vlmbuild.families.family_of(values, folder)
    config = family.config(values)
    if family.name == "mllama":
        with pytest.raises(vlmbuild.VlmbuildError, match="cross-attention"):
            family.gguf_model(config)
        return
    model = family.gguf_model(config)
    assert header(model.arch, model.text, ()) and header("MMPROJ", model.vision, ())
    assert hasattr(gguf.VisionProjectorType, model.projector)


def test_every_family_has_an_answer():
    assert set(FAMILIES) == {*KNOWN, "mllama"}
