"""The formats of compressed-tensors: the library decompresses what they store to what they say they store."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization.utils import calculate_qparams

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.formats import format_from_json
from vlmbuild.quant import compressed_formats
from vlmbuild.quant.compressed_formats import FP8, W4A16, W8A8

FORMS = [W4A16(), W4A16(32), W8A8(), FP8()]
ERRORS = {"w4a16": 0.105, "w8a8": 0.01, "fp8": 0.03}
"""Relative errors of normally distributed weights: 4-bit numbers alone would lose 11 % without clipping."""


def weight(rows=64, columns=1024):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def encoded(form, values, dtype=torch.bfloat16, rows=None):
    """Parts by suffix, and the rounded values."""
    chunks = values.flatten().split((rows or len(values)) * values.shape[1])
    parts, rounded = {}, []
    for chunk in form.encode_rounded(chunks, tuple(values.shape), dtype, "w"):
        rounded.append(chunk.rounded)
        for suffix, part in chunk.parts.items():
            parts.setdefault(suffix, []).append(part)
    return {suffix: torch.cat(found) for suffix, found in parts.items()}, torch.cat(rounded)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.describe())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_library_decompresses_to_the_rounded_values(form, dtype):
    values = weight()
    parts, rounded = encoded(form, values, dtype)
    specs = {spec.name: (spec.dtype, spec.shape) for spec in form.parts("", tuple(values.shape), dtype)}
    assert specs == {suffix: (part.dtype, tuple(part.shape)) for suffix, part in parts.items()}
    scheme = form.scheme(["Linear"])
    state = {suffix.removeprefix("."): part for suffix, part in parts.items()}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert torch.equal(compressor.decompress(state, scheme)["weight"], rounded.to(dtype))
    assert (rounded - values).norm() < ERRORS[form.name] * values.norm()
    # What the library makes of the weight with these scales is what is stored.
    again = compressor.compress({"weight": values, "weight_scale": parts[".weight_scale"]}, scheme)
    assert all(torch.equal(again[name], part) for name, part in state.items())
    assert sum(part.numel() * part.element_size() * 8 for part in parts.values()) == form.bits(
        tuple(values.shape)
    ) + 128 * (form.name == "w4a16") + 16 * parts[".weight_scale"].numel() * (dtype == torch.float32)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.describe())
def test_chunks_change_nothing(form):
    values = weight()
    whole, pieces = encoded(form, values)[0], encoded(form, values, rows=5)[0]
    assert all(torch.equal(whole[suffix].float(), pieces[suffix].float()) for suffix in whole)
    assert format_from_json(form.to_json()) == form


def test_clipping_loses_less_than_the_whole_range(monkeypatch):
    values = weight()
    _, rounded = encoded(W4A16(), values)
    monkeypatch.setattr(compressed_formats, "CLIPPED", (1.0,))
    parts, unclipped = encoded(W4A16(), values)
    groups = values.unflatten(1, (-1, 128))
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), W4A16().scheme(["Linear"]).weights)
    assert torch.equal(parts[".weight_scale"], scales.to(torch.bfloat16))
    assert (rounded - values).norm() < 0.95 * (unclipped - values).norm()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.describe())
def test_zeros_and_small_values_stay_finite(form):
    values = weight()
    values[0], values[1] = 0, 1e-9
    for dtype in (torch.float16, torch.bfloat16):
        parts, rounded = encoded(form, values, dtype)
        assert not rounded[0].any()
        assert torch.isfinite(rounded).all()
        assert (parts[".weight_scale"] > 0).all()
    values[2, 3] = torch.nan
    with pytest.raises(SourceError, match="w holds NaN"):
        encoded(form, values)


def test_groups_fit_rows():
    assert W4A16().fitted((8, 256)) == W4A16()
    assert W4A16().fitted((8, 192)) == W4A16(64)
    assert W4A16(64).fitted((8, 96)) == W4A16(32)
    assert W4A16().fitted((8, 40)) is None
    assert W8A8().fitted((8, 40)) == W8A8()
    with pytest.raises(UsageError, match="group_size.* 16"):
        W4A16(16)
    with pytest.raises(UsageError, match=r"\(8, 40\)"):
        W4A16().parts("m", (8, 40), torch.bfloat16)
