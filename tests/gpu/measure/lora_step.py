"""A LoRA step of Qwen2-VL-7B in NF4 beside transformers with PEFT, on the same random weights; all activations are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.gpu.measure import qwen
from tests.gpu.measure.record import Record, Row, Setting

RANK = 16
ANCHOR = 14_110
"""Tokens per second of the text step, published for an H100."""
BATCHES: dict[str, list[tuple[int, int]]] = {
    "text": [(2048, 0)] * 4,
    "four images a sample, equal lengths": [(256, 4)] * 4,
    "four images a sample, ragged lengths": [(64, 4), (1024, 4), (128, 4), (512, 4)],
}
"""Text tokens and images of each sample. Ours packs ragged rows; the peer computes their padding."""
SMALL = {"text": [(9, 0)] * 2, "four images a sample, ragged lengths": [(5, 4), (9, 4)]}
LIMIT = 2e-2
"""Relative difference of the first losses, whose weights are the same."""


def run(record: Record, setting: Setting) -> None:
    """Time eager sides first; compiled ones last, since compiling takes longest."""
    dtype = torch.float32 if setting.small else setting.dtype
    models: dict[str, Any] = {}
    with record.row("weights", layers="all", weights="random") as row:
        config = qwen.make_config(setting, "7b")
        peer = qwen.random_peer(setting, config, True, dtype)
        ours = qwen.ours_from(peer, config, True, dtype)
        models = {"vlmbuild": _with_lora(ours), "transformers + PEFT": _with_peft(peer)}
        row["trainable"] = {name: sum(p.numel() for p in parameters) for name, (_, parameters) in models.items()}
    if not models:
        return
    batches = SMALL if setting.small else BATCHES
    for name, samples in batches.items():
        with record.row(f"eager: {name}") as row:
            _compare(setting, config, row, models, samples)
            if name == "text":
                row["over_anchor"] = row["tokens_per_second"] / ANCHOR
    for name in list(batches)[: 1 if setting.small else 2]:
        with record.row(f"compiled: {name}") as row:
            model, parameters = models["vlmbuild"]
            model.compile(backend=setting.backend)
            _compare(setting, config, row, {"vlmbuild": (model, parameters)}, batches[name])


def _with_lora(model: Any) -> tuple[Any, list[Any]]:
    from vlmbuild.train.lora import add_lora

    add_lora(model, r=RANK)
    return model.train(), [parameter for _, parameter in model.trainable_parameters()]


def _with_peft(model: Any) -> tuple[Any, list[Any]]:
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    return model.train(), [parameter for parameter in model.parameters() if parameter.requires_grad]


def _compare(
    setting: Setting, config: Any, row: Row, models: dict[str, Any], samples: Sequence[tuple[int, int]]
) -> None:
    """Real tokens per second of each side, padding not counted; fewer samples where memory ends."""
    while True:
        try:
            sides = {name: _measure(setting, config, *side, samples) for name, side in models.items()}
            break
        except torch.OutOfMemoryError:
            if len(samples) == 1:
                raise
            samples = samples[: len(samples) // 2]
            qwen.free()
    ours = sides.pop("vlmbuild")
    row |= {"samples": len(samples), **ours, "ms": 1e3 * ours["seconds_of_a_step"]}
    row["peers"] = {
        name: {**side, "ratio": side["seconds_of_a_step"] / ours["seconds_of_a_step"]} for name, side in sides.items()
    }
    for side in sides.values():
        row["error"] = abs(ours["loss"] - side["loss"]) / abs(side["loss"])
        row["right"] = row["error"] <= LIMIT


def _measure(
    setting: Setting, config: Any, model: Callable[..., Any], parameters: list[Any], samples: Sequence[tuple[int, int]]
) -> Row:
    batch = qwen.make_batch(setting, config, samples)
    with torch.no_grad():
        loss = float(model(**batch).loss)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = [parameter.detach().clone() for parameter in parameters]
    seconds = qwen.seconds_of(setting, qwen.train_step(model, parameters, batch))
    peak = torch.cuda.max_memory_allocated() if setting.device == "cuda" else None
    with torch.no_grad():  # the next batch starts from the same weights
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    qwen.free()
    tokens = int(batch["attention_mask"].sum())
    places = batch["attention_mask"].numel()
    return {
        "loss": loss,
        "tokens": tokens,
        "padding": places - tokens,
        "seconds_of_a_step": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes_with_both_models": peak,
    }
