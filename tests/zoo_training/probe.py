"""The vision tower's warm-up: a linear probe on every patch names the digit centred there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmbuild.demo.digits import Digits, Sample

EMPTY = 10
"""The class of a patch in which no digit is centred."""
IGNORED = -100
"""The class of what the loss passes over."""


class ZooFamily(Protocol):
    """Interface of a family's module in this package."""

    WARM_UP_STEPS: int
    STEPS: int
    """Training steps after the warm-up."""
    EMPTY_WEIGHT: float
    """Weight in the warm-up's loss of features without a digit; 1.0 counts all alike."""

    def make_processor(self) -> Any: ...

    def make_config(self, tokenizer: Any) -> Any: ...

    def make_model(self, config: Any) -> Any: ...

    def vision_modules(self, model: Any) -> tuple[nn.Module, ...]: ...

    def patch_features(self, model: Any, images: Any) -> Tensor: ...

    def patch_cells(self, samples: Sequence[Sample], images: Any) -> Tensor: ...


def cells_of(sample: Sample, rows: int, columns: int) -> Tensor:
    """Return the digit whose centre lies in each cell of a grid laid over the canvas, `EMPTY` for none: `[rows, columns]`."""
    cells = torch.full((rows, columns), EMPTY)
    for digit, (x, y) in zip(sample.digits, sample.centres, strict=True):
        cells[int(y * rows), int(x * columns)] = digit
    return cells


def warm_up(
    family: ZooFamily, model: Any, processor: Any, stream: Digits, steps: int, batch_size: int, peak: float
) -> None:
    """Teach the vision tower first.

    Without it the language loss alone stays at chance for thousands of steps: nothing tells the tower what to look for.
    """
    probe = nn.Linear(model.config.get_text_config().hidden_size, EMPTY + 1)
    modules = (*family.vision_modules(model), probe)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.05)
    accuracy = 0.0
    weight = torch.ones(EMPTY + 1)
    weight[EMPTY] = family.EMPTY_WEIGHT
    for step in range(1, steps + 1):
        samples = stream.take(batch_size)
        images = processor.image_processor([[sample.image] for sample in samples], return_tensors="pt")
        logits, cells = probe(family.patch_features(model, images)), family.patch_cells(samples, images)
        nn.functional.cross_entropy(logits, cells, weight, ignore_index=IGNORED).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        filled = (cells != EMPTY) & (cells != IGNORED)
        accuracy = 0.98 * accuracy + 0.02 * float((logits.argmax(-1) == cells)[filled].float().mean())
        if step % 250 == 0:
            print({"warm-up step": step, "accuracy": round(accuracy, 3)}, flush=True)
