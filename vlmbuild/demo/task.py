"""Questions about canvases of digits: chat messages, training batches with labels, and scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmbuild.demo.digits import Sample
from vlmbuild.families.chat import question_text
from vlmbuild.runtime.torch.loss import IGNORED
from vlmbuild.train.collator import VisionDataCollator


@dataclass(frozen=True, slots=True)
class Task:
    """A question, and its correct answer for the digits on a canvas."""

    question: str
    answer: Callable[[tuple[int, ...]], str]


READ = Task("Read the digits.", lambda digits: "".join(map(str, digits)))
LARGEST = Task("What is the largest digit?", lambda digits: str(max(digits)))


def prompt(processor: Any, task: Task) -> str:
    """Render the chat prompt of one image and the task's question."""
    return question_text(processor, task.question, 1)


def training_batch(processor: Any, task: Task, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Make a batch of prompts and answers; `labels` are the answer and its end token, -100 elsewhere."""
    return VisionDataCollator(processor)([_example(task, sample) for sample in samples])


def _example(task: Task, sample: Sample) -> dict[str, Any]:
    """Make one chat sample in the format of the collator."""
    question = {"role": "user", "content": task.question}
    return {
        "images": [sample.image],
        "messages": [question, {"role": "assistant", "content": task.answer(sample.digits)}],
    }


@torch.no_grad()
def exact_match(model: Any, processor: Any, task: Task, samples: Sequence[Sample], batch_size: int = 100) -> float:
    """Return the share of samples whose answer has the highest logits at every position.

    Greedy decoding gives the same score: both read the same text up to the first wrong token.
    """
    training = model.training
    model.eval()
    right = 0
    for start in range(0, len(samples), batch_size):
        batch = training_batch(processor, task, samples[start : start + batch_size])
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch).logits[:, :-1].argmax(-1)
        right += int(((predicted == labels) | (labels == IGNORED)).all(-1).sum())
    model.train(training)
    return right / len(samples)


@torch.no_grad()
def answers(model: Any, processor: Any, task: Task, samples: Sequence[Sample]) -> list[str]:
    """Return the model's greedy answers."""
    texts = [prompt(processor, task)] * len(samples)
    images = [[sample.image] for sample in samples]
    batch = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=8, do_sample=False)
    new = generated[:, batch["input_ids"].shape[1] :]
    decoded: list[str] = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in decoded]
