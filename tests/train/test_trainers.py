"""Other people's trainers, unmodified: transformers' Trainer, TRL's SFTTrainer, accelerate, and a plain loop."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
import trl
from accelerate import Accelerator
from tiny import make_batch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from transformers import Trainer, TrainingArguments

import vlmbuild
from vlmbuild.demo.digits import Digits
from vlmbuild.errors import BatchError, UsageError
from vlmbuild.runtime.torch.checkpointing import Checkpointing

LAYOUTS = (
    [[5, (1, 4, 6), 7]],
    [[1, (1, 8, 8), 2]],
    [[5], [9]],
    [[3, (1, 2, 6), 2], [4, (1, 6, 2), 11]],
    [[9, (1, 2, 10)]],
    [[7]],
    [[6, (1, 4, 4), 3]],
    [[2, (1, 2, 2), 8]],
)
BATCHES = [{**batch, "labels": labels} for batch, labels in map(make_batch, LAYOUTS)]
"""Ready batches, text-only ones among them."""


def first(examples):
    return examples[0]


def chosen(examples):
    return BATCHES[examples[0]["number"]]


@pytest.fixture(scope="module")
def adapted(nf4):
    def load():
        torch.manual_seed(0)
        model, _ = vlmbuild.load(nf4.path)
        vlmbuild.add_lora(model.train(), r=4, vision=True)
        return model

    return load


@pytest.fixture(scope="module")
def full(plain):
    return lambda: vlmbuild.load(plain.path)[0].train()


OPTIONS = {
    "max_steps": 4,
    "lr_scheduler_type": "constant",  # a shorter run has the first losses of a longer one
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "logging_steps": 1,
    "save_steps": 2,
    "learning_rate": 1e-3,
    "report_to": "none",
    "remove_unused_columns": False,
    "disable_tqdm": True,
    "use_cpu": True,
}


def trainer(model, path, data=BATCHES, callbacks=None, **options):
    arguments = TrainingArguments(str(path), **{**OPTIONS, **options})
    return Trainer(model, arguments, first, data, data, callbacks=callbacks)


def losses(trainer, **options):
    trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def uninterrupted(adapted, tmp_path_factory):
    """Losses of four steps, and the directory with a checkpoint after two."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return losses(trainer(adapted(), directory)), directory


@pytest.fixture(scope="module")
def expected(uninterrupted):
    return uninterrupted[0]


def test_resumed_training_has_the_losses_of_uninterrupted_training(adapted, uninterrupted, tmp_path):
    whole, directory = uninterrupted
    assert len(set(whole)) == 4
    again = trainer(adapted(), tmp_path)
    assert losses(again, resume_from_checkpoint=str(directory / "checkpoint-2")) == whole


def test_resumed_full_training_has_the_losses_of_uninterrupted_training(full, tmp_path):
    whole = losses(trainer(full(), tmp_path, max_steps=2, save_steps=1))
    again = trainer(full(), tmp_path / "again", max_steps=2)
    assert losses(again, resume_from_checkpoint=str(tmp_path / "checkpoint-1")) == whole


def test_accumulated_batches_are_one_large_batch(adapted, tmp_path):
    both = [[5, (1, 4, 6), 7]], [[1, (1, 8, 8), 2]]
    parts = [{**batch, "labels": labels} for batch, labels in map(make_batch, both)]
    whole, labels = make_batch([*both[0], *both[1]])
    lengths = [len(part["input_ids"][0]) for part in parts]
    for row, part in enumerate(parts):  # the same tokens and pixels
        part["input_ids"] = whole["input_ids"][row : row + 1, : lengths[row]]
        part["labels"] = labels[row : row + 1, : lengths[row]]
    counts = [len(part["pixel_values"]) for part in parts]
    for part, pixels in zip(parts, whole["pixel_values"].split(counts), strict=True):
        part["pixel_values"] = pixels
    options = {"max_steps": 2, "save_strategy": "no", "train_sampling_strategy": "sequential"}
    one, other = adapted(), adapted()
    large = losses(trainer(one, tmp_path, [{**whole, "labels": labels}], **options))
    small = losses(trainer(other, tmp_path, parts, gradient_accumulation_steps=2, **options))
    assert small == pytest.approx(large, rel=1e-5)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(adapted, expected, tmp_path):
    options = {"every_n_layers": 2, "offload": True}
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options, "save_strategy": "no"}
    found = trainer(adapted(), tmp_path, max_steps=2, **arguments)
    assert losses(found) == expected[:2]
    assert found.model.checkpointing == Checkpointing(every=2, offload=True)


def test_autocast_is_close(adapted, expected, tmp_path):
    found = trainer(adapted(), tmp_path, max_steps=2, bf16=True, save_strategy="no")
    assert losses(found) == pytest.approx(expected[:2], rel=0.02)


def test_evaluation(adapted, tmp_path):
    found = trainer(adapted(), tmp_path, data=BATCHES[:2], prediction_loss_only=False)
    model = found.model.eval()
    with torch.no_grad():
        outputs = [model(**batch) for batch in BATCHES[:2]]
    assert found.evaluate()["eval_loss"] == pytest.approx(float(sum(o.loss for o in outputs)) / 2, rel=1e-6)
    logits = found.predict(BATCHES[:1]).predictions
    assert torch.equal(torch.from_numpy(logits), outputs[0].logits)
    found.args.prediction_loss_only = True
    assert found.evaluate()["eval_loss"] == pytest.approx(float(sum(o.loss for o in outputs)) / 2, rel=1e-6)


def test_log_and_adapters_beside_checkpoints(adapted, nf4, tmp_path, capsys):
    options = {"train_sampling_strategy": "sequential", "save_steps": 2, "max_steps": 2}
    found = trainer(adapted(), tmp_path, callbacks=[vlmbuild.TrainingCallback()], **options)
    assert len(losses(found)) == 2
    entries = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    tokens = [int(batch["attention_mask"].sum()) for batch in BATCHES[:2]]
    assert [entry["num_input_tokens_seen"] for entry in entries] == [tokens[0], sum(tokens)]
    assert all(entry["train_tokens_per_second"] > 0 for entry in entries)
    assert entries[1]["peak_memory"] >= entries[0]["peak_memory"] > 2**20
    assert f"'peak_memory': {entries[1]['peak_memory']}" in capsys.readouterr().out
    again, _ = vlmbuild.load(nf4.path)
    vlmbuild.load_adapter(again, tmp_path / "checkpoint-2")
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


class Stream(torch.utils.data.IterableDataset):
    """Samples with images, two to a batch."""

    def __iter__(self):
        yield from (sample for sample in Digits("train", 1).take(4))


@pytest.mark.parametrize("zoo", ["qwen2-vl-digits", pytest.param("pixtral-digits", marks=pytest.mark.slow)])
def test_an_iterable_data_set_needs_an_option_of_accelerate(zoo, zoo_artifact, tmp_path):
    model, processor = vlmbuild.load(zoo_artifact(zoo, dtype="float32").path)
    vlmbuild.add_lora(model.train(), r=2)

    def collate(samples):
        question = {"role": "user", "content": "<image>Which? <image>And here?"}
        messages = [question, {"role": "assistant", "content": "8"}]
        images = [sample.image for sample in samples]
        return collator([{"messages": messages, "images": [image, image]} for image in images])

    collator = vlmbuild.VisionDataCollator(processor)
    options = {**OPTIONS, "max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), **options)
    with pytest.raises(BatchError, match=r'accelerator_config=\{"dispatch_batches": False\}'):
        Trainer(model, arguments, collate, Stream()).train()
    arguments = TrainingArguments(str(tmp_path), accelerator_config={"dispatch_batches": False}, **options)
    Trainer(model, arguments, collate, Stream()).train()


def sft(model, processor, path, **options):
    arguments = trl.SFTConfig(
        str(path),
        **{
            **OPTIONS,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "gradient_checkpointing": False,
            "bf16": False,
            **options,
        },
    )
    data = datasets.Dataset.from_dict({"number": list(range(len(BATCHES)))})
    return trl.SFTTrainer(model, arguments, chosen, data, processing_class=processor)


def test_sft_trainer_has_the_losses_of_trainer(adapted, expected, nf4, tmp_path):
    processor = vlmbuild.load(nf4.path)[1]
    found = losses(sft(adapted(), processor, tmp_path / "b"))
    assert found == pytest.approx(expected, rel=1e-5)
    again = sft(adapted(), processor, tmp_path / "c")
    assert losses(again, resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")) == found


def test_a_loss_that_would_overlook_the_heads_adapter_is_refused(plain, tmp_path):
    model, processor = vlmbuild.load(plain.path)
    vlmbuild.add_lora(model, r=4, target=["q_proj"])
    torch.nn.Module.register_module(model.lm_head, "lora_A", torch.nn.Module())
    with pytest.raises(UsageError, match=r"The head is quantized or has an adapter.*transformers\.Trainer"):
        sft(model, processor, tmp_path).train()


def plain_loop(model, batches, optimizer, backward):
    found = []
    for batch in batches:
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_plain_loop_and_accelerate(adapted, tmp_path):
    model = adapted()
    expected = plain_loop(model, BATCHES[:2], torch.optim.AdamW(trained(model), lr=1e-3), lambda loss: loss.backward())
    accelerator = Accelerator(cpu=True)
    model = adapted()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-3))
    found = plain_loop(model, BATCHES[:1], optimizer, accelerator.backward)
    accelerator.save_state(str(tmp_path))
    found += plain_loop(model, BATCHES[1:2], optimizer, accelerator.backward)
    assert found == expected
    accelerator.load_state(str(tmp_path))
    assert plain_loop(model, BATCHES[1:2], optimizer, accelerator.backward) == expected[1:]


@pytest.mark.parametrize("what", ["adapted", "full"])
def test_distributed_checkpoints_own_state_dict(what, request):
    make = request.getfixturevalue(what)
    model, other = make(), make()
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.1)
    state = get_model_state_dict(model)
    assert set(state) == set(model.state_dict())
    set_model_state_dict(other, state)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_into_compiled_models_and_ties_stay(full, assign):
    model, other = full(), torch.compile(full(), backend="eager")
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.add_(1)
    other.load_state_dict({f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}, assign=assign)
    inner = vlmbuild.VisionLanguageModel.get_submodule(other._orig_mod, "lm_head")
    assert inner.weight is other._orig_mod.get_input_embeddings().weight
    assert torch.equal(other._orig_mod.model.visual.patch_embed.proj.weight, model.model.visual.patch_embed.proj.weight)


def test_compiled_under_trainer_each_region_once(adapted, tmp_path):
    images = [batch for batch in BATCHES if "pixel_values" in batch]
    expected = losses(trainer(adapted(), tmp_path, images, max_steps=2, save_strategy="no"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2, "save_strategy": "no"}
    model = adapted()
    compiled = trainer(model, tmp_path, images, [vlmbuild.TrainingCallback()], **options)
    assert losses(compiled) == pytest.approx(expected, rel=1e-5)
    torch._dynamo.reset()
    regions = {call.region for call in model.program.variants["image"].calls}
    entries = [entry for entry in compiled.state.log_history if "loss" in entry]
    assert [entry["compilations"] for entry in entries] == [len(regions)] * 2
