"""The quantization_config: what transformers reads and writes, skip lists as it understands them, other methods refused."""

from __future__ import annotations

import json

import pytest
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.quant.bnb_config import (
    announced_format,
    check_method,
    is_skipped,
    quantization_config,
)
from vlmbuild.quant.int8 import Int8, threshold_of
from vlmbuild.quant.nf4 import FP4, NF4


@pytest.mark.parametrize(
    ("form", "method"),
    [(NF4(), "nf4"), (FP4(128, False), "fp4"), (Int8(), "llm_int8"), (Int8(0.0), "llm_int8")],
)
def test_config_is_what_transformers_reads_and_writes(form, method):
    config = quantization_config([form], skip_modules=["model.visual.merger.mlp.0", "lm_head"], compute_dtype="float16")
    parsed = BitsAndBytesConfig.from_dict(dict(config))
    written = {key: value for key, value in parsed.to_dict().items() if not key.startswith("_")}
    assert json.loads(json.dumps(written)) == config
    assert parsed.quantization_method() == method
    assert config["llm_int8_skip_modules"] == ["lm_head", "model.visual.merger.mlp.0"]
    found = announced_format(config)
    assert found == (form if isinstance(form, Int8) else type(form)(64, form.double_quant))


def test_four_and_eight_bits_together_are_not_transformers():
    config = quantization_config([NF4(), Int8()], skip_modules=[], compute_dtype="float16")
    assert config["quant_method"] == "vlmbuild"
    assert check_method(config, "here") is config


def test_skipping_follows_transformers():
    skips = ["lm_head", "model.visual", "model.layers.1.mlp", "model.layers.1"]
    names = [
        "lm_head",
        "model.lm_head",
        "model.visual.blocks.0.attn.qkv",
        "model.visual2.x",
        "model.layers.1.q",
        "model.layers.11.q",
        "model.layers.1",
        "x.model.layers.1",
        "model",
        "lm_head2",
    ]
    for name in names:
        assert is_skipped(name, skips) != should_convert_module(name, skips), name
    assert not is_skipped("lm_head", [])
    assert should_convert_module("lm_head", [])


def test_names_that_would_be_patterns():
    with pytest.raises(UsageError, match=r"module name 'layers\.\*' in the skip list is not a plain dotted name"):
        quantization_config([NF4()], skip_modules=["layers.*"], compute_dtype="float32")


@pytest.mark.parametrize("config", [{"quant_method": "hqq"}, {"quant_method": ["gptq"]}, "awq", None, []])
def test_other_methods_are_refused(config):
    with pytest.raises(SourceError, match="models/x is quantized with .*build from the unquantized checkpoint"):
        check_method(config, "models/x")


@pytest.mark.parametrize(("value", "threshold"), [(5, 5.0), (0.0, 0.0), ("6", 6.0), (True, 6.0), (None, 6.0)])
def test_threshold(value, threshold):
    assert threshold_of({"llm_int8_threshold": value}) == threshold
