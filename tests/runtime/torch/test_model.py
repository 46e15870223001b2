"""The trainable module against transformers on the same weights: logits, loss, every gradient, generation, conversions."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import BF16_RATIO, MODEL_FP32, assert_close
from tiny import BATCHES, FAMILY, make_batch

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.runtime.torch.region import BoundRegion


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train_step(model, batch, labels, **options):
    model.zero_grad(set_to_none=True)
    output = model(**batch, labels=labels, **options)
    output.loss.backward()
    return output


@pytest.mark.parametrize(
    "name",
    [
        "image first",
        "two grids, left",
        "some without image",
        "three images in a row",
        "frames",
        "video and image",
        "one text",
    ],
)
def test_logits_loss_and_every_gradient_equal_transformers(name, model, reference):
    layout, side = BATCHES[name]
    batch, labels = make_batch(layout, side)
    ours, theirs = train_step(model, batch, labels), train_step(reference, batch, labels)
    attended = batch["attention_mask"].bool()
    assert ours.logits.shape == theirs.logits.shape
    assert_close(ours.logits[attended], theirs.logits[attended], MODEL_FP32, "logits")
    assert_close(ours.loss, theirs.loss, MODEL_FP32, "loss")
    expected, found = gradients(reference), gradients(model)
    assert set(found) == set(expected) and len(found) > 30
    for parameter, gradient in expected.items():
        assert gradient.norm() > 0, parameter
        assert_close(found[parameter], gradient, MODEL_FP32, parameter)
    reference.zero_grad(set_to_none=True)


def test_positions_of_the_parity_batches_differ_on_three_axes(config):
    different = 0
    for layout, side in BATCHES.values():
        positions = FAMILY.prepare(make_batch(layout, side)[0], config).tensors.get("position_ids")
        different += all(not torch.equal(positions[a], positions[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    assert different >= 10


def test_padding_has_zero_logits_and_no_influence(model):
    batch, _ = make_batch([[5, (1, 4, 6), 7], [4]], "left")
    padding = batch["attention_mask"] == 0
    with torch.no_grad():
        before = model(**batch).logits
        batch["input_ids"] = batch["input_ids"].masked_fill(padding, 33)
        after = model(**batch).logits
    assert torch.equal(before, after)
    assert not before[padding].any()


def test_sample_is_independent_of_its_neighbours(model):
    alone, _ = make_batch([[5, (1, 4, 6), 7]], seed=3)
    other, _ = make_batch([[9, (1, 2, 2), 4]], seed=4)
    both = {key: torch.cat([alone[key], other[key]]) for key in ("pixel_values", "image_grid_thw")}
    length = alone["input_ids"].shape[1]
    for key in ("input_ids", "attention_mask"):
        both[key] = torch.cat([alone[key], torch.nn.functional.pad(other[key], (0, length - other[key].shape[1]))])
    with torch.no_grad():
        assert_close(model(**both).logits[:1], model(**alone).logits, MODEL_FP32)


def test_without_attention_mask_every_token_counts(model):
    batch, _ = make_batch([[5, (1, 4, 6), 7]])
    bare = {key: value for key, value in batch.items() if key in ("input_ids", "pixel_values", "image_grid_thw")}
    with torch.no_grad():
        assert torch.equal(model(**bare).logits, model(**batch).logits)


def test_num_items_in_batch_divides_the_summed_loss(model, reference):
    batch, labels = make_batch(*BATCHES["two grids, right"])
    for items in (7, torch.tensor(40)):
        ours = train_step(model, batch, labels, num_items_in_batch=items)
        theirs = train_step(reference, batch, labels, num_items_in_batch=items)
        assert_close(ours.loss, theirs.loss, MODEL_FP32)
    assert_close(ours.loss * 40, model(**batch, labels=labels).loss * (labels[:, 1:] >= 0).sum(), MODEL_FP32)
    reference.zero_grad(set_to_none=True)


def test_last_place_of_left_padding_predicts_nothing(model):
    batch, labels = make_batch([[5], [9]], "left")
    labelled = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        assert torch.equal(model(**batch, labels=labelled).loss, model(**batch, labels=labels).loss)


def test_bfloat16_error_is_no_larger_than_transformers(bind, built, reference):
    wide = bind(built)
    narrow, theirs = copy.deepcopy(wide).to(torch.bfloat16), copy.deepcopy(reference).to(torch.bfloat16)
    errors = {"ours": {"logits": 0.0, "gradients": 0.0}, "theirs": {"logits": 0.0, "gradients": 0.0}}
    for seed, (layout, side) in enumerate(list(BATCHES.values())[::4]):
        batch, labels = make_batch(layout, side, seed)
        attended = batch["attention_mask"].bool()
        exact = train_step(wide, batch, labels)
        for name, model in (("ours", narrow), ("theirs", theirs)):
            logits = train_step(model, batch, labels).logits
            assert logits.dtype == torch.bfloat16
            errors[name]["logits"] += (logits[attended] - exact.logits[attended]).norm().item() ** 2
            found = gradients(model)
            errors[name]["gradients"] += sum(
                ((found[key].float() - expected).norm() / expected.norm()).item() ** 2
                for key, expected in gradients(wide).items()
            )
    for what, error in errors["ours"].items():
        assert error**0.5 <= BF16_RATIO * errors["theirs"][what] ** 0.5, (what, errors)


def test_state_dict_has_transformers_names_and_round_trips(model, reference, bind, built):
    state = model.state_dict()
    assert set(state) == set(reference.state_dict()) - {"lm_head.weight"}  # tied: it stands there once
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.load_state_dict(reference.state_dict())
    batch, _ = make_batch(*BATCHES["two grids, left"])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, bind(built)(**batch).logits)


def test_constants_are_not_in_the_state_dict(model):
    names = {name for name, slot in model.program.slots() if slot.kind == "constant"}
    assert len(names) == 2 and not names & set(model.state_dict())
    assert names <= {name for name, _ in model.named_buffers()}


def test_tied_head_is_the_same_parameter(model):
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.to(torch.bfloat16).lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.float16), lambda m: m.bfloat16()])
def test_conversion_keeps_frequencies_in_float32(convert, model):
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert len(frequencies) == 2
    converted = convert(model)
    assert converted is model and model.dtype == next(model.parameters()).dtype != torch.float32
    for name, buffer in model.named_buffers():
        if name in frequencies:
            assert buffer.dtype == torch.float32 and torch.equal(buffer, frequencies[name])
    assert model(**make_batch([[5, (1, 4, 6), 7]])[0]).logits.dtype == model.dtype


def test_there_and_back_again(model, bind, built):
    batch, _ = make_batch(*BATCHES["video and image"])
    direct = bind(built, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model.to(torch.bfloat16)(**batch).logits, direct(**batch).logits)
        assert model.to(torch.float32)(**batch).logits.dtype == torch.float32
    assert model.to("cpu") is model and model.dtype == torch.float32


def test_evaluation_mode_gives_the_same_logits(model):
    batch, labels = make_batch(*BATCHES["two grids, left"])
    training = model(**batch, labels=labels)
    assert training.logits.requires_grad
    with torch.no_grad():
        evaluation = model.eval()(**batch, labels=labels)
    assert torch.equal(training.logits, evaluation.logits) and torch.equal(training.loss, evaluation.loss)
    assert model(**batch).loss is None


@pytest.fixture
def calls(monkeypatch):
    counted = []
    call = BoundRegion.__call__

    def counting(self, *arguments):
        counted.append(self.region.name)
        return call(self, *arguments)

    monkeypatch.setattr(BoundRegion, "__call__", counting)
    return counted


def test_checkpointing_recomputes_blocks_and_changes_nothing(model, calls):
    batch, labels = make_batch(*BATCHES["video and image"])
    plain = train_step(model, batch, labels)
    expected = gradients(model)
    blocks = {name: calls.count(name) for name in set(calls)}
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    again = train_step(model, batch, labels)
    repeated = {"visual.blocks", "language_model.layers"}
    counts = {name: calls.count(name) for name in set(calls)}
    assert torch.equal(plain.loss, again.loss) and torch.equal(plain.logits, again.logits)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())
    assert counts == {name: count * 2 if name in repeated else count for name, count in blocks.items()}
    calls.clear()
    with torch.no_grad():
        model(**batch)
    model.gradient_checkpointing_disable()
    train_step(model, batch, labels)
    assert calls.count("language_model.layers") == 6 and not model.is_gradient_checkpointing


def test_checkpointing_reaches_adapters_above_frozen_weights(model):
    """The first block's input needs no gradient then; its parameters do."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    batch, labels = make_batch(*BATCHES["one image"])
    train_step(model, batch, labels)
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    train_step(model, batch, labels)
    assert expected and set(expected) == {name for name, _ in model.trainable_parameters()}
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_misspelled_generation_options_are_refused(model):
    with pytest.raises(UsageError, match="max_new_tokns"):
        model.eval().generate(**make_batch([[5]])[0], max_new_tokns=2)


def test_logits_on_demand_are_found_by_name_too(model):
    batch, labels = make_batch([[5, (1, 4, 6), 7]])
    output = model(**batch, labels=labels)
    assert torch.equal(output["logits"], model(**batch).logits) and output.get("logits") is output.logits


def test_data_parallel_sends_no_buffers(nf4):
    from vlmbuild import load

    model, _ = load(nf4.path)
    assert set(model._ddp_params_and_buffers_to_ignore) == {name for name, _ in model.named_buffers()}
    assert any("absmax" in name for name in model._ddp_params_and_buffers_to_ignore)


def test_misspelled_tensors_are_refused(model):
    batch, _ = make_batch([[5]])
    with pytest.raises(UsageError, match="model: unknown argument 'attention_masks'. A batch may have attention_mask,"):
        model(input_ids=batch["input_ids"], attention_masks=batch["attention_mask"])


def test_loss_and_logits_come_before_backward_frees_the_graph(model):
    output = model(**make_batch([[5]])[0])
    assert output.logits.grad_fn is not None


def test_bad_batch_is_refused_before_any_region_runs(model, calls):
    batch, _ = make_batch([[5, (1, 4, 6), 7]])
    del batch["pixel_values"]
    with pytest.raises(BatchError, match="pixel_values"):
        model(**batch)
    assert calls == []


def test_labels_of_another_shape_are_refused(model, calls):
    batch, labels = make_batch([[5], [7]])
    with pytest.raises(BatchError, match=r"labels has shape \(2, 6\), input_ids \(2, 7\)"):
        model(**batch, labels=labels[:, :6])
    assert calls == []


def test_row_of_padding_alone_changes_nothing(model):
    batch, labels = make_batch([[5, (1, 4, 6), 7], [8, (1, 2, 4)]])
    fuller = dict(batch)
    for key in ("input_ids", "attention_mask"):
        fuller[key] = torch.nn.functional.pad(batch[key], (0, 0, 1, 0))
    more_labels = torch.nn.functional.pad(labels, (0, 0, 1, 0), value=-100)
    expected, found = model(**batch, labels=labels), model(**fuller, labels=more_labels)
    assert torch.equal(found.logits[1:], expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_missing_tensor_is_an_error(built, config, reference):
    state = reference.state_dict()
    state.pop("model.visual.merger.mlp.0.weight")
    with pytest.raises(KeyError, match=r"merger.mlp.0.weight"):
        VisionLanguageModel(built, FAMILY, config, state, torch.float32)
