"""Whole runs of TRL's DPO and GRPO with images: losses and rewards of transformers and PEFT on the same weights."""

from __future__ import annotations

import math

import datasets
import peft
import pytest
import torch
import trl
from adapters import fill_adapter
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import LARGEST
from vlmbuild.errors import UsageError

pytestmark = pytest.mark.slow  # trains through TRL twice
SAME = {"rel": 1e-3, "abs": 1e-6}
OPTIONS = {
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "beta": 0.1,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def artifact(zoo_artifact):
    return zoo_artifact("qwen2-vl-digits", dtype="float32").path


@pytest.fixture
def models(artifact, tmp_path):
    """(std of matrix B, **options) -> our model and PEFT's with equal adapters, in training mode."""

    def make(std, **options):
        ours, _ = vlmbuild.load(artifact)
        vlmbuild.add_lora(ours.train(), r=4, target=["q_proj", "v_proj"], **options)
        if std:
            fill_adapter(ours, std)
        vlmbuild.save_adapter(ours, tmp_path / "adapter")
        theirs = AutoModelForImageTextToText.from_pretrained(artifact, dtype=torch.float32)
        return ours, peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).train()

    return make


def logged(trainer, *keys):
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == OPTIONS["max_steps"]
    values = [float(step[key]) for step in steps for key in keys]
    assert all(map(math.isfinite, values))
    return values


def dpo(model, artifact, path, reference=None):
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": LARGEST.question}]}]

    def answer(text):
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    rows = [
        {
            "images": [sample.image],
            "prompt": question,
            "chosen": answer(LARGEST.answer(sample.digits)),
            "rejected": answer("0"),
        }
        for sample in Digits("train", 1).take(6)
    ]
    arguments = trl.DPOConfig(str(path), per_device_train_batch_size=2, max_length=None, **OPTIONS)
    data = datasets.Dataset.from_list(rows)
    processor = vlmbuild.load(artifact)[1]
    return trl.DPOTrainer(model, reference, arguments, train_dataset=data, processing_class=processor)


DPO_KEYS = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins")


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}], ids=["plain", "dropout"])
def test_dpo_is_pefts(models, artifact, tmp_path, options):
    """The adapter has been trained before, so that the first loss says something; DPO turns dropout off."""
    ours, theirs = models(0.02, **options)
    with pytest.warns(UserWarning, match="adapter has been trained before"):
        trainer = dpo(ours, artifact, tmp_path)
    found = logged(trainer, *DPO_KEYS)
    reference = AutoModelForImageTextToText.from_pretrained(artifact, dtype=torch.float32)
    expected = logged(dpo(theirs, artifact, tmp_path, reference), *DPO_KEYS)
    assert abs(expected[0] - math.log(2)) > 1e-4
    assert found == pytest.approx(expected, **SAME)


def test_grpo_is_pefts(models, artifact, tmp_path):
    rows = [
        {
            "images": [sample.image],
            "prompt": [{"role": "user", "content": LARGEST.question}],
            "answer": LARGEST.answer(sample.digits),
        }
        for sample in Digits("train", 1).take(3)
    ]

    def reward(completions, answer, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [float(right in text) + 0.1 * len(set(text)) for right, text in zip(answer, texts, strict=True)]

    def run(model):
        sampling = {"num_generations": 4, "max_completion_length": 4, "temperature": 1.5}
        arguments = trl.GRPOConfig(str(tmp_path), per_device_train_batch_size=4, **sampling, **OPTIONS)
        data, processor = datasets.Dataset.from_list(rows), vlmbuild.load(artifact)[1]
        trainer = trl.GRPOTrainer(model, reward, arguments, data, processing_class=processor)
        return logged(trainer, "kl", "loss", "grad_norm", "reward", "reward_std")

    ours, theirs = models(0)
    found = run(ours)
    assert found[0] == pytest.approx(0, abs=1e-9)  # the reference is the model without its new adapter
    assert max(found[5::5]) > 1e-6
    assert found == pytest.approx(run(theirs), **SAME)


def test_another_probability_of_dropout_is_refused(models):
    ours, _ = models(0, dropout=0.5)
    (dropout,) = (module for module in ours.modules() if isinstance(module, torch.nn.Dropout))
    dropout.p = 0.25
    with pytest.raises(UsageError, match=r"lora_dropout\.p is 0\.25.*has 0\.5.*dropout=0\.25"):
        ours(input_ids=torch.ones(1, 4, dtype=torch.long))
