"""Parameters trained whole: kept in float32, cast where they are read, the same values as before."""

from __future__ import annotations

import pytest
import torch
from tiny import linear_region, make_batch, make_region, operators, region_program

from vlmbuild.errors import UsageError
from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import COMPUTE_DTYPE, Slot
from vlmbuild.passes import TrainWeights
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.train.lora import add_lora


def trained(region, *names):
    program = region_program(region)
    return run([TrainWeights(frozenset(names))], program)[0], program


def test_weight_is_cast_before_the_product():
    region = linear_region()
    report, _ = trained(region, "blocks.0.proj.weight", "blocks.1.proj.weight")
    assert report.sites == {"blocks": 1} and report.matches == 2
    assert [(slot.name, slot.dtype) for slot in region.slots] == [
        ("proj.weight", torch.float32),
        ("proj.bias", COMPUTE_DTYPE),
    ]
    assert operators(region) == ["aten.linear.default", "aten.to.dtype"]


def test_rows_of_a_table_are_cast_after_they_are_read():
    slots = [Slot("table.weight", (300, 16), COMPUTE_DTYPE, "parameter", "embedding")]
    region = make_region(
        "blocks", lambda w, x: (torch.nn.functional.embedding(x.long(), w),), slots, [("1", "tokens")], ("",)
    )
    trained(region, "table.weight")
    (node,) = region.results()
    assert node.target is torch.ops.aten.to.dtype
    assert node.args[0].target is torch.ops.aten.embedding.default


def test_instances_that_are_not_named_go_to_a_region_of_their_own():
    region = linear_region()
    _, program = trained(region, "blocks.1.proj.bias")
    assert {name: part.instances for name, part in program.regions.items()} == {
        "blocks": ("blocks.0",),
        "blocks/2": ("blocks.1",),
    }


def test_second_run_finds_nothing():
    region = linear_region()
    trained(region, "blocks.0.proj.weight", "blocks.1.proj.weight")
    before = digest(region)
    report, _ = trained(region, "blocks.0.proj.weight", "blocks.1.proj.weight")
    assert report.sites == {} and digest(region) == before


def test_values_are_unchanged_and_gradients_arrive_in_float32(bind, built, reference):
    batch, labels = make_batch([[5, (1, 4, 6), 7], [9]])
    plain = bind(built, torch.bfloat16)
    expected = plain(**batch, labels=labels)
    expected.loss.backward()
    gradient = plain.get_parameter("model.visual.merger.mlp.0.weight").grad
    model = bind(built, torch.bfloat16)
    add_lora(model, r=2, modules_to_save=["embed_tokens", "visual.merger"])
    found = model(**batch, labels=labels)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)
    found.loss.backward()
    whole = {name: p for name, p in model.trainable_parameters() if ".lora_" not in name}
    assert {p.dtype for p in whole.values()} == {torch.float32} and all(p.grad.norm() > 0 for p in whole.values())
    assert set(whole) == {
        "model.language_model.embed_tokens.weight",
        *(f"model.visual.merger.{part}" for part in ("ln_q.weight", "ln_q.bias", "mlp.0.weight", "mlp.0.bias")),
        *(f"model.visual.merger.{part}" for part in ("mlp.2.weight", "mlp.2.bias")),
    }
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert torch.equal(gradient, whole["model.visual.merger.mlp.0.weight"].grad.bfloat16())


def test_tied_head_trains_the_embeddings(model):
    add_lora(model, r=2, modules_to_save=["lm_head"])
    assert model.adapter.modules == ("lm_head", "model.language_model.embed_tokens")
    assert model.lm_head.weight.requires_grad


def test_unknown_and_quantized_modules(model, nf4):
    with pytest.raises(UsageError, match="no module of the model is named 'lm_heat'"):
        add_lora(model, r=2, modules_to_save=["lm_heat"])
    from vlmbuild import load

    quantized, _ = load(nf4.path)
    with pytest.raises(UsageError, match=r"mlp\.up_proj is quantized and cannot be trained whole.*--skip"):
        add_lora(quantized, r=2, modules_to_save=["up_proj"])
