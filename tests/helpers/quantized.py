"""Whole weights quantized by vlmbuild's streaming functions, and by bitsandbytes, as the tensors that are stored."""

from __future__ import annotations

import torch

from vlmbuild.quant.nf4 import NF4


def quantize(tensor, form=NF4()):
    """By suffix, the packed weight first."""
    shape = tuple(tensor.shape)
    parts = dict(form.encode([tensor.flatten()], shape, tensor.dtype, "w"))
    parts[".weight"] = parts[".weight"].view(-1, 1)
    suffixes = [spec.name for spec in form.parts("", shape, tensor.dtype)]
    assert parts.keys() == set(suffixes)
    return {suffix.removeprefix(".weight"): parts[suffix] for suffix in suffixes}


def reference(tensor, form=NF4()):
    """Quantize with bitsandbytes."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        tensor, blocksize=form.blocksize, compress_statistics=form.double_quant, quant_type=form.name
    )
    return {"": packed, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}


def assert_same_tensors(one, two):
    assert list(one) == list(two)
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype, key
        assert torch.equal(tensor, two[key]), key
