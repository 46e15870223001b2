"""Quantized linear layers: what is quantized and what is not, slots and recipes, values, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import SAME_WEIGHTS_FP32, assert_close
from quantized import quantize
from tiny import linear_region, make_region, operators, region_program

from vlmbuild.formats import format_class
from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import COMPUTE_DTYPE, Slot, WeightRecipe
from vlmbuild.ops.linear_4bit.dequantize import Packed4bit, dequantize_4bit
from vlmbuild.passes import QuantizeLinear
from vlmbuild.quant.bnb_state import parse_quant_state
from vlmbuild.quant.decide import decide
from vlmbuild.quant.int8 import Int8, quantize_rows
from vlmbuild.quant.nf4 import NF4
from vlmbuild.quant.spec import Override, QuantSpec
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.runtime.torch.region import BoundRegion


def quantize_program(program, **options):
    return run([QuantizeLinear(decide(program, QuantSpec(**options)))], program)[0]


def quantized(region, **options):
    return quantize_program(region_program(region), **options)


def test_slots_and_recipe_of_a_quantized_layer():
    region = linear_region()
    report = quantized(region)
    assert report.sites == {"blocks": 1}
    assert report.matches == 2
    slots = {slot.name: (slot.shape, slot.dtype, slot.kind) for slot in region.slots}
    assert slots == {
        "proj.bias": ((64,), torch.bfloat16, "parameter"),
        "proj.weight": ((4096, 1), torch.uint8, "buffer"),
        "proj.weight_absmax": ((128,), torch.uint8, "buffer"),
        "proj.weight_nested_absmax": ((1,), torch.float32, "buffer"),
        "proj.weight_nested_offset": ((), torch.float32, "buffer"),
    }
    assert region.recipes == (WeightRecipe("proj.weight", (64, 128), NF4()),)
    assert operators(region) == ["vlmbuild.linear_4bit.default"]


def test_without_double_quantization_scales_are_float32():
    region = linear_region(bias=False)
    quantized(region, double_quant=False, blocksize=128, format="fp4")
    assert {slot.name: slot.dtype for slot in region.slots} == {
        "proj.weight": torch.uint8,
        "proj.weight_absmax": torch.float32,
    }


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_format", ["nf4", "fp4"])
def test_values_are_those_of_the_dequantized_weight(double_quant, quant_format):
    torch.manual_seed(0)
    weight, bias, values = torch.randn(64, 128), torch.randn(64), torch.randn(1, 7, 128, requires_grad=True)
    region = linear_region()
    quantized(region, double_quant=double_quant, format=quant_format)
    parts = quantize(weight, format_class(quant_format)(64, double_quant))
    state = parse_quant_state(parts[f".quant_state.bitsandbytes__{quant_format}"])
    tensors = {"proj.weight": parts[""], "proj.weight_absmax": parts[".absmax"], "proj.bias": bias}
    nested = (None, None)
    if double_quant:
        nested = (parts[".nested_absmax"], torch.tensor(state.nested_offset))
        tensors |= {"proj.weight_nested_absmax": nested[0], "proj.weight_nested_offset": nested[1]}
    graph = BoundRegion(region, torch.float32, ()).graph
    (ours,) = graph(*(tensors[slot.name] for slot in region.slots), values)
    (gradient,) = torch.autograd.grad(ours.sum(), values)
    form = (128, 64, 64, quant_format, torch.float32)
    exact = dequantize_4bit(Packed4bit(parts[""], parts[".absmax"], *nested, *form))
    expected = torch.nn.functional.linear(values, exact, bias)
    assert_close(ours, expected, SAME_WEIGHTS_FP32)
    assert_close(gradient, torch.autograd.grad(expected.sum(), values)[0], SAME_WEIGHTS_FP32)
    assert (exact - weight).norm() > 0.01 * weight.norm()  # it is quantized


@pytest.mark.parametrize("role", ["vision", "projector", "embedding", "head"])
def test_other_roles_keep_their_dtype_and_say_so(role):
    region = linear_region(role)
    before = digest(region)
    report = quantized(region)
    assert report.sites == {}
    assert digest(region) == before
    assert report.refusals == (f"blocks: proj: role {role} keeps its dtype",)


def test_weight_that_is_used_elsewhere_is_left_alone():
    def forward(weight, values):
        return (torch.nn.functional.linear(values, weight) * weight.sum(),)

    slot = Slot("proj.weight", (64, 128), COMPUTE_DTYPE, "parameter", "language")
    region = make_region("blocks", forward, [slot], [("1", "tokens", 128)], ("blocks.0",))
    before = digest(region)
    report = quantized(region)
    assert (report.sites, report.refusals) == ({}, ("blocks: proj: its weight is used elsewhere too",))
    assert digest(region) == before


def test_computed_weight_is_left_alone():
    def forward(weight, values):
        return (torch.nn.functional.linear(values, weight.exp()),)

    slot = Slot("proj.weight", (64, 128), COMPUTE_DTYPE, "parameter", "language")
    region = make_region("blocks", forward, [slot], [("1", "tokens", 128)], ("blocks.0",))
    assert quantized(region).refusals == ("blocks: a product with a computed weight",)


def test_second_run_finds_nothing():
    region = linear_region()
    quantized(region)
    before = digest(region)
    assert quantized(region).sites == {}
    assert digest(region) == before


def test_skip_list_by_pattern():
    region = linear_region()
    report = quantized(region, skip=("*.proj",))
    assert report.sites == {}
    assert report.refusals == ("blocks: proj: in the skip list",)


def test_eight_bits():
    region = linear_region()
    quantized(region, format="int8", threshold=5.5)
    slots = {slot.name: (slot.shape, slot.dtype, slot.kind) for slot in region.slots}
    assert slots == {
        "proj.bias": ((64,), torch.bfloat16, "parameter"),
        "proj.weight": ((64, 128), torch.int8, "buffer"),
        "proj.weight_scb": ((64,), torch.float32, "buffer"),
    }
    assert operators(region) == ["vlmbuild.linear_8bit.default"]
    torch.manual_seed(0)
    weight, bias, values = torch.randn(64, 128), torch.randn(64), torch.randn(1, 7, 128)
    rows, scales = quantize_rows(weight)
    tensors = {"proj.weight": rows, "proj.weight_scb": scales, "proj.bias": bias}
    (ours,) = BoundRegion(region, torch.float32, ()).graph(*(tensors[slot.name] for slot in region.slots), values)
    expected = torch.nn.functional.linear(values, weight, bias)
    assert 0 < (ours - expected).norm() < 0.02 * expected.norm()


def test_layers_that_are_quantized_differently_get_regions_of_their_own(built):
    whole = copy.deepcopy(built)
    report = quantize_program(
        built, overrides=(Override("*layers.1.mlp.up_proj", "int8"), Override("*layers.2.self_attn.*_proj", "none"))
    )
    names = [name for name in built.regions if name.startswith("language_model.layers")]
    assert names == ["language_model.layers", "language_model.layers/2", "language_model.layers/3"]
    assert [built.regions[name].instances for name in names] == [
        (f"model.language_model.layers.{number}",) for number in (0, 1, 2)
    ]
    assert report.sites == dict(zip(names, (7, 7, 3), strict=True))
    assert report.matches == 17
    called = [call.region for call in built.variants["image"].calls if call.region.startswith("language_model.layers")]
    assert called == names
    found = {recipe.source: recipe.format for recipe in built.regions[names[1]].recipes}
    assert found.pop("mlp.up_proj.weight") == Int8()
    assert set(found.values()) == {NF4()}
    quantize_program(whole)
    assert digest(built.regions[names[0]]) == digest(whole.regions[names[0]])
    second = digest(built.regions[names[1]])
    assert quantize_program(built).sites == {names[2]: 4}  # what an override had kept
    assert digest(built.regions[names[1]]) == second


def test_all_language_layers_of_the_model(built):
    report = quantize_program(built)
    assert report.sites == {"language_model.layers": 7}
    assert report.matches == 21
    assert any("visual.blocks: mlp.fc1: role vision" in reason for reason in report.refusals)
    assert any("embed_tokens: its weight is used elsewhere" in reason for reason in report.refusals)  # the tied head


def test_lookups_and_the_tied_head_are_marked_for_a_target_that_packs(built):
    spec = QuantSpec("int4", roles=("embedding", "head"))
    module = "model.language_model.embed_tokens"
    decisions = decide(built, spec)
    before = digest(built.regions["language_model.layers"])
    report = run([QuantizeLinear(decisions, packed=True)], built)[0]
    regions = [
        region for region in built.regions.values() if any(r.source == f"{module}.weight" for r in region.recipes)
    ]
    assert report.sites == {region.name: 1 for region in regions}
    assert len(regions) == report.matches == 3  # with images, without, and the head
    marks = [str(n.target) for region in regions for n in region.graph.graph.nodes if "_packed" in str(n.target)]
    assert sorted(marks) == [*["vlmbuild.embedding_packed.default"] * 2, "vlmbuild.linear_packed.default"]
    assert digest(built.regions["language_model.layers"]) == before
    assert run([QuantizeLinear(decisions, packed=True)], built)[0].sites == {}
