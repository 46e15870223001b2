"""The shipped checkpoint of each family, eager and compiled, against transformers: loss, logits and gradients."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu.measure.record import Record, Setting, distance

LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative error against transformers in float32."""


def run(record: Record, setting: Setting) -> None:
    """Measure the families one by one; the rehearsal has the first one alone."""
    from vlmbuild.zoo import ZOO

    for name in list(ZOO)[: 1 if setting.small else None]:
        for dtype in ("float32",) if setting.small else LIMITS:
            sides = _sides(setting, name, dtype)
            for side in ("eager", "compiled")[: 1 if setting.small else 2]:
                with record.row(f"{name}, {dtype}, {side}") as row:
                    row |= next(sides)
                    row["error"] = max(row["loss"], row["logits"])
                    row["right"] = row["error"] <= LIMITS[dtype]


def _sides(setting: Setting, name: str, dtype: str) -> Iterator[dict[str, Any]]:
    from transformers import AutoModelForImageTextToText

    import vlmbuild
    from vlmbuild.demo.digits import Digits
    from vlmbuild.demo.task import READ, training_batch
    from vlmbuild.zoo import ZOO

    with tempfile.TemporaryDirectory() as directory:
        artifact = Path(directory) / "artifact"
        vlmbuild.build(name, artifact, vlmbuild.Recipe(dtype=dtype))  # type: ignore[arg-type]
        model, processor = vlmbuild.load(artifact)
    theirs = AutoModelForImageTextToText.from_pretrained(ZOO[name], dtype=torch.float32).to(setting.device)
    batch = training_batch(processor, READ, Digits("held_out", 0).take(4))
    batch = {key: value.to(setting.device) for key, value in batch.items()}
    labels = batch.pop("labels")
    expected = _step(theirs, batch, labels)
    model = model.to(setting.device)
    yield _errors(_step(model, batch, labels), expected)
    model.compile(backend=setting.backend)
    yield _errors(_step(model, batch, labels), expected)


def _step(model: Any, batch: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    model.train().zero_grad(set_to_none=True)
    with torch.no_grad():
        logits = model(**batch).logits[batch["attention_mask"].bool()]
    loss = model(**batch, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": logits, "gradients": gradients}


def _errors(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    names = sorted(expected["gradients"])
    flat = [torch.cat([side["gradients"][name].float().flatten() for name in names]) for side in (found, expected)]
    errors = {key: distance(found[key].float(), expected[key]) for key in ("loss", "logits")}
    return errors | {"gradients": distance(*flat), "parameters": len(names)}
