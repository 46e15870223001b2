"""LoRA: graphs, names and start values, on plain and on quantized layers."""

from __future__ import annotations

import pytest
import torch
from parity import MODEL_FP32, assert_close
from tiny import linear_region, make_batch, region_program

from vlmbuild.adapters.lora import Lora
from vlmbuild.errors import UsageError
from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import Slot
from vlmbuild.passes import AddLora, QuantizeLinear
from vlmbuild.quant.decide import decide
from vlmbuild.recipe import QuantSpec
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.runtime.torch.region import BoundRegion
from vlmbuild.train.lora import add_lora


def adapted(region, lora=Lora(4, 8.0), modules=("blocks.0.proj", "blocks.1.proj")):
    program = region_program(region)
    return run([AddLora(dict.fromkeys(modules, lora))], program)[0]


def test_slots_have_pefts_names_and_shapes():
    region = linear_region()
    report = adapted(region)
    assert report.sites == {"blocks": 1}
    assert region.slots[-2:] == (
        Slot("proj.lora_A.default.weight", (4, 128), torch.float32, "parameter", "language"),
        Slot("proj.lora_B.default.weight", (64, 4), torch.float32, "parameter", "language"),
    )


def test_value_and_gradients_are_the_formulas():
    torch.manual_seed(0)
    region = linear_region()
    adapted(region)
    weight, bias, down, up = torch.randn(64, 128), torch.randn(64), torch.randn(4, 128), torch.randn(64, 4)
    leaves = [down.requires_grad_(), up.requires_grad_(), torch.randn(1, 7, 128, requires_grad=True)]
    (ours,) = BoundRegion(region, torch.float32, ()).graph(weight, bias, *leaves)
    values = leaves[2]
    expected = values @ weight.T + bias + 8.0 / 4 * (values @ down.T @ up.T)
    assert_close(ours, expected, 1e-6)
    for found, right in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        assert_close(found, right, 1e-5)


def test_adapters_compute_in_float32_under_a_bfloat16_model():
    torch.manual_seed(0)
    region = linear_region(bias=False)
    adapted(region)
    weight, values = torch.zeros(64, 128, dtype=torch.bfloat16), torch.randn(1, 7, 128).bfloat16()
    down, up = torch.randn(4, 128), torch.randn(64, 4)
    (ours,) = BoundRegion(region, torch.bfloat16, ()).graph(weight, down, up, values)
    assert torch.equal(ours, (8.0 / 4 * (values.float() @ down.T @ up.T)).bfloat16())


def test_quantized_layers_are_adapted_too():
    region = linear_region()
    program = region_program(region)
    run([QuantizeLinear(decide(program, QuantSpec()))], program)
    assert adapted(region).sites == {"blocks": 1}
    assert {slot.shape for slot in region.slots if "lora" in slot.name} == {(4, 128), (64, 4)}


def test_layers_that_are_not_named_are_left_alone():
    region = linear_region()
    before = digest(region)
    assert adapted(region, modules=()).sites == {}
    assert digest(region) == before


def test_second_run_refuses():
    region = linear_region()
    adapted(region)
    before = digest(region)
    report = adapted(region)
    assert report.sites == {}
    assert report.refusals == ("blocks: proj: has an adapter already",)
    assert digest(region) == before


def test_model_is_unchanged_until_trained_and_only_adapters_train(model):
    batch, labels = make_batch([[5, (1, 4, 6), 7, (1, 8, 2), 3], [9, (1, 2, 2), 4]])
    before = model(**batch).logits
    add_lora(model, r=4)
    assert_close(model(**batch).logits, before, MODEL_FP32)
    trainable = {name for name, _ in model.trainable_parameters()}
    assert len(trainable) == 3 * 7 * 2
    assert all(".lora_" in name for name in trainable)
    model(**batch, labels=labels).loss.backward()
    assert all((p.grad is not None) == (name in trainable) for name, p in model.named_parameters())
    grads = {name: p.grad.abs().sum() for name, p in model.trainable_parameters()}
    assert all(grad > 0 for name, grad in grads.items() if "lora_B" in name)


def test_roles_choose_layers(model):
    add_lora(model, r=2, target=("vision", "projector"))
    names = {name.partition(".lora_")[0] for name, _ in model.trainable_parameters()}
    assert len(names) == 2 * 4 + 2
    assert all("visual" in name for name in names)


@pytest.mark.parametrize(("options", "message"), [({"r": 0}, "at least 1"), ({"target": "head"}, "shares its weight")])
def test_bad_options(model, options, message):
    with pytest.raises(UsageError, match=message):
        add_lora(model, **options)


def test_second_adapter_is_refused(model):
    add_lora(model, r=2)
    with pytest.raises(UsageError, match="has an adapter .* already"):
        add_lora(model, r=2)
