"""Whole weights quantized by vlmbuild's streaming functions, and by bitsandbytes, as the tensors that are stored."""

from __future__ import annotations

import torch

from vlmbuild.formats import FourBit
from vlmbuild.quant.bnb_4bit import quantized_parts
from vlmbuild.quant.bnb_quantize import quantize_blocks


def quantize(tensor, form=FourBit()):
    """By suffix, the packed weight first."""
    packed, absmax = quantize_blocks(tensor.flatten(), quant_type=form.name, blocksize=form.blocksize)
    return {"": packed.view(-1, 1), **quantized_parts(absmax, tensor.shape, tensor.dtype, form)}


def reference(tensor, form=FourBit()):
    """The same of bitsandbytes."""
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
