"""llama.cpp's formats: the package's own bytes, and shapes that they do not have."""

from __future__ import annotations

import gguf
import pytest
import torch

import vlmbuild
from vlmbuild.formats import FORMATS, format_class, format_from_json
from vlmbuild.quant.gguf import GgufFormat
from vlmbuild.recipe import formats_of_targets

NAMES = [name for name in FORMATS if issubclass(format_class(name), GgufFormat)]


def test_they_are_those_of_the_target():
    assert tuple(NAMES) == formats_of_targets()["gguf"]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_packages(name):
    form, rows = format_class(name)(), torch.randn(6, 64)
    packed = form.pack(rows, "w")
    assert packed.tobytes() == gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[name.upper()]).tobytes()
    assert form.bits((6, 64)) == 8 * packed.nbytes
    assert torch.equal(form.rounded(rows.flatten(), "w").view(6, 64), form.unpack(packed))
    assert float((form.unpack(packed) - rows).norm() / rows.norm()) < 0.12
    assert format_from_json(form.to_json()) == form


@pytest.mark.parametrize("name", NAMES)
def test_rows_must_be_whole_blocks(name):
    form = format_class(name)()
    assert not form.refusal((5, 96))
    assert "48" in form.refusal((5, 48))


def test_values_must_be_finite():
    with pytest.raises(vlmbuild.VlmbuildError, match="the_weight"):
        format_class("q8_0")().pack(torch.full((1, 32), torch.nan), "the_weight")
