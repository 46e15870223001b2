"""Packs: every sample once, within the budget; loss and gradients as of the samples alone, ours and transformers'."""

from __future__ import annotations

import matrix
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import CANCELLED, MODEL_FP32, relative
from samples import SAMPLES
from setups import PROCESSORS

from vlmbuild import PackedDataset, VisionDataCollator, pack, padding_report
from vlmbuild.errors import BatchError, UsageError


@pytest.fixture(scope="module", params=matrix.SETUPS)
def setup(request):
    return matrix.tiny(request.param)


@pytest.fixture(scope="module")
def collate(setup):
    """The collator, with the ids as the setup's vocabulary numbers them."""
    collator = VisionDataCollator(setup.processor)

    def collate(samples):
        batch = collator(samples)
        ids = setup.shrunk(batch["input_ids"])
        return {**batch, "input_ids": ids, "labels": torch.where(batch["labels"] == -100, -100, ids)}

    return collate


@pytest.fixture(scope="module")
def theirs(setup):
    return matrix.reference(setup)


@pytest.fixture(scope="module")
def ours(setup, theirs):
    return matrix.bind(setup, matrix.program(setup), theirs)


@pytest.fixture(scope="module")
def dataset(setup):
    collator = VisionDataCollator(setup.processor)
    longest = max(collator.measure(sample).tokens for sample in SAMPLES)
    return PackedDataset(SAMPLES, collator, longest + 60)


def accumulated(model, batches):
    """Loss over all labels of the batches, and its gradients, computed batch by batch."""
    model.zero_grad(set_to_none=True)
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        loss = model(**batch).loss * count / sum(counts)
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(found, expected):
    assert relative(found[0], expected[0]) <= MODEL_FP32
    norm = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name in found[1].keys() | expected[1].keys():
        ours, theirs = (grads.get(name, torch.zeros(())) for grads in (found[1], expected[1]))
        if theirs.numel() > 1:  # gates cancel: test_parity holds them against float64
            assert (ours - theirs).norm() <= MODEL_FP32 * max(theirs.norm(), CANCELLED * norm), name


def test_samples_that_do_not_fit_are_left_out_before_training():
    processor = PROCESSORS["qwen2_vl"]()
    collator = VisionDataCollator(processor, max_length=60, overlong="drop")
    with pytest.warns(UserWarning, match=r"Left out of \d+ samples, \d+ have an image"):
        packed = PackedDataset(SAMPLES, collator, max_tokens=60)
    assert 0 < len(packed.indices) < len(SAMPLES)
    for item in range(len(packed)):
        assert collator(packed[item])["input_ids"].shape[1] <= 60
    with pytest.raises(BatchError, match="the first is sample"):
        PackedDataset(SAMPLES, VisionDataCollator(processor, max_length=60), max_tokens=60)


def test_a_pack_trains_as_its_samples_alone(dataset, collate, ours, theirs):
    """Loss and every gradient: packed by us, sample by sample by us, sample by sample by transformers."""
    assert any(len(samples) > 1 for samples in dataset)
    for samples in dataset:
        packed = accumulated(ours, [collate(samples)])
        alone = [collate([sample]) for sample in samples]
        assert_equal_steps(packed, accumulated(ours, alone))
        assert_equal_steps(packed, accumulated(theirs, alone))


def test_the_model_computes_no_padding_of_a_pack(setup, dataset, collate):
    for number, samples in enumerate(dataset):
        prepared = setup.family.prepare(collate(samples), setup.config())
        tokens = sum(dataset.lengths[index] for index in dataset.packs[number])
        assert prepared.tensors["input_ids"].shape == (1, tokens)
        assert len(prepared.tensors["text_cu_seqlens"]) == len(samples) + 2


def test_images_that_would_pad_are_kept_apart(setup, dataset):
    """A pack of Llama's has as many images in every sample: none is computed that no sample has."""
    counts = [
        {
            len(s.get("images", []))
            or ("content" in s["messages"][0] and not isinstance(s["messages"][0]["content"], str))
            for s in samples
        }
        for samples in dataset
    ]
    if setup.family.pads_image_batch:
        assert all(len(found) == 1 for found in counts)
    else:
        assert any(len(found) > 1 for found in counts)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 500), max_size=200),
    st.integers(1, 600),
    st.integers(1, 300),
    st.integers(0, 5),
    st.booleans(),
)
def test_every_sample_is_packed_once_within_the_budget(lengths, budget, window, seed, grouped):
    groups = [length % 3 for length in lengths] if grouped else None
    packs = pack(lengths, budget, groups=groups, window=window, seed=seed, overlong="alone")
    assert sorted(index for one in packs for index in one) == list(range(len(lengths)))
    for one in packs:
        assert sum(lengths[index] for index in one) <= budget or len(one) == 1
        assert not grouped or len({lengths[index] % 3 for index in one}) == 1
    assert packs == pack(lengths, budget, groups=groups, window=window, seed=seed, overlong="alone")


def test_companions_are_the_best_fitting():
    packs = pack([6, 5, 4, 3, 2], 10)
    assert sorted(sorted(one) for one in packs) == [[0, 2], [1, 3, 4]]  # both full


def test_seeds_shuffle():
    assert pack(range(1, 60), 100, window=8) != pack(range(1, 60), 100, window=8, seed=1)


def test_options_are_checked():
    with pytest.raises(BatchError, match=r"Sample 1 of the data set has 9 tokens, more than the 5 of a pack\. Raise"):
        pack([1, 9], 5)
    for arguments, message in (
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": 5, "window": 0}, "window must be"),
        ({"max_tokens": 5, "overlong": "cut"}, "overlong"),
        ({"max_tokens": 5, "groups": [1]}, "groups has 1 entries, lengths 2"),
    ):
        with pytest.raises(UsageError, match=message):
            pack([1, 2], **arguments)
    with pytest.raises(UsageError, match="batch_size"):
        padding_report([1], [[0]], 0)
    for packs in ([[0]], [[0], [0, 1]]):
        with pytest.raises(UsageError, match="each of the 2 samples once"):
            padding_report([1, 2], packs, 1)


class Stream(torch.utils.data.IterableDataset):
    """A data set of the kind that is read in order."""

    def __iter__(self):
        return iter(SAMPLES)


def test_a_stream_is_refused():
    collator = VisionDataCollator(PROCESSORS["qwen2_vl"]())
    for dataset in (Stream(), iter(SAMPLES)):
        with pytest.raises(UsageError, match=rf"{type(dataset).__name__} is read in order.*list\(dataset\)"):
            PackedDataset(dataset, collator, 1000)


def test_padding_report_counts():
    report = padding_report([10, 30, 20, 40], [[3], [1, 0], [2]], 2, max_tokens=40)
    assert report.padded == ((60, 80), pytest.approx(40 / 140))
    assert report.packed == ((40, 40, 20), 0)
    assert report.fill == pytest.approx(100 / 120)
    assert "28.6%" in str(report)
    assert "83.3% full" in str(report)


def test_transformers_trainer_takes_packs(tmp_path, setup, ours):
    """One pass over the data, three packs to a step of the optimizer, with transformers' own loop."""
    if setup.family.name != "qwen2_vl":
        pytest.skip("the loop is the same for every family")
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    collator = VisionDataCollator(setup.processor)
    dataset = PackedDataset(SAMPLES, collator, max(collator.measure(sample).tokens for sample in SAMPLES) + 60)
    seen = []

    def shrunk(packs):
        batch = collator(packs)
        ids = setup.shrunk(batch["input_ids"])
        seen.append(len(ids))
        return {**batch, "input_ids": ids, "labels": torch.where(batch["labels"] == -100, -100, ids)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        learning_rate=0.0,
        disable_tqdm=True,
    )
    result = Trainer(model=ours, args=arguments, train_dataset=dataset, data_collator=shrunk).train()
    assert sum(seen) == len(SAMPLES)
    assert len(seen) == len(dataset)
    assert 0 < result.training_loss < 20
