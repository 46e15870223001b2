"""The packed quantization state: parsed strictly, and written so that bitsandbytes reads it."""

from __future__ import annotations

import json

import pytest
import torch
from quantized import quantize

from vlmbuild.errors import SourceError
from vlmbuild.quant.bnb_state import parse_quant_state
from vlmbuild.quant.nf4 import NF4

pytest.importorskip("bitsandbytes")


def state_of(**changes):
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [64, 128],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.25,
    }
    state.update(changes)
    text = json.dumps({key: value for key, value in state.items() if value is not ...})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("double_quant", [True, False])
def test_parsing_what_was_written(double_quant):
    stored = quantize((0.02 * torch.randn(64, 128)).bfloat16(), NF4(double_quant=double_quant))
    state = parse_quant_state(stored[".quant_state.bitsandbytes__nf4"])
    assert (state.quant_type, state.blocksize, state.dtype, state.shape) == ("nf4", 64, torch.bfloat16, (64, 128))
    assert (state.nested_offset is not None) == double_quant
    if double_quant:
        assert state.nested_blocksize == 256
        assert 0 < state.nested_offset < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_type": "int4"}, "quant_type is 'int4'"),
        ({"quant_type": []}, r"quant_type is \[\]"),
        ({"blocksize": 63}, "blocksize is 63"),
        ({"blocksize": 64.0}, "blocksize is 64.0"),
        ({"dtype": "load"}, "dtype is 'load'"),
        ({"shape": [64, -1]}, r"shape is \[64, -1\]"),
        ({"shape": None}, "shape is None"),
        ({"nested_blocksize": 1}, "nested_blocksize is 1"),
        ({"nested_dtype": "bfloat16"}, "nested_dtype is 'bfloat16'"),
        ({"nested_offset": "1"}, "nested_offset is '1'"),
        ({"nested_offset": float("nan")}, "NaN is not a finite number"),
        ({"nested_offset": ...}, "does not have exactly the keys blocksize, dtype, quant_type, shape, or also"),
        ({"more": 1}, "does not have exactly the keys"),
    ],
)
def test_states_that_are_refused(changes, words):
    with pytest.raises(SourceError, match=f"state q.weight cannot be used: .*{words}.*Quantize the checkpoint again"):
        parse_quant_state(state_of(**changes), name="q.weight")


@pytest.mark.parametrize("tensor", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)])
def test_states_that_are_not_bytes(tensor):
    with pytest.raises(SourceError, match="not a short line of bytes"):
        parse_quant_state(tensor)
    with pytest.raises(SourceError, match="cannot be used"):
        parse_quant_state(torch.tensor([123, 255], dtype=torch.uint8))
    twice = torch.tensor(list(b'{"dtype":"float32","dtype":"float32"}'), dtype=torch.uint8)
    with pytest.raises(SourceError, match="'dtype' comes twice"):
        parse_quant_state(twice)
