"""The memory that `vlmbuild.plan` announces beside the peak that torch's allocator reports, on Qwen2-VL-2B in NF4."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.gpu.measure import qwen
from tests.gpu.measure.record import Record, Setting

RANK = 16
CASES = ((2, 1024), (8, 1024))
"""Samples and text tokens of each."""
STEPS = ("infer", "train", "train_checkpointed")


def run(record: Record, setting: Setting) -> None:
    """Plan each case, then run it; planned over measured below 1 means that a plan promises too little."""
    dtype = torch.float32 if setting.small else setting.dtype
    for samples, tokens in ((1, 8),) if setting.small else CASES:
        plan: dict[str, Any] = {}
        with record.row(f"plan: {samples} x {tokens} tokens") as row:
            plan = _plan(setting, dtype, samples, tokens)
            row |= {step: plan[step] for step in STEPS}
        measured = _measure(setting, dtype, samples, tokens)
        for step in STEPS if plan else ():
            with record.row(f"{step}: {samples} x {tokens} tokens") as row:
                qwen.needs_gpu(setting, "there is no GPU whose allocator could report a peak")
                name, peak = next(measured)
                assert name == step
                row |= {"planned": plan[step], "measured": peak, "planned_over_measured": plan[step] / peak}


def _plan(setting: Setting, dtype: torch.dtype, samples: int, tokens: int) -> dict[str, Any]:
    import vlmbuild

    recipe = vlmbuild.Recipe(dtype=str(dtype).removeprefix("torch."), quantize=vlmbuild.QuantSpec())
    workload = vlmbuild.Workload(batch=samples, text_tokens=tokens, rank=RANK, device=setting.device)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(qwen.config_values(setting, "2b")))
        memory: dict[str, Any] = vlmbuild.plan(directory, recipe, workload=workload).memory.to_json()
    return memory


def _measure(setting: Setting, dtype: torch.dtype, samples: int, tokens: int) -> Iterator[tuple[str, int]]:
    """Yield (step, peak in bytes), in the order of STEPS; the model is made when the first is taken."""
    from vlmbuild.train.lora import add_lora

    qwen.free()
    before = torch.cuda.memory_allocated()
    config = qwen.make_config(setting, "2b")
    model = qwen.ours_from(qwen.random_peer(setting, config, True, dtype), config, True, dtype)
    qwen.free()
    batch = qwen.make_batch(setting, config, [(tokens, 0)] * samples)
    batch["labels"] = batch["input_ids"]
    inference = {name: value for name, value in batch.items() if name != "labels"}

    def peak(call: Any) -> int:
        qwen.free()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    model.eval()
    yield "infer", peak(torch.no_grad()(lambda: model(**inference)))
    add_lora(model, r=RANK)
    model.train()
    parameters = [parameter for _, parameter in model.trainable_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients of accumulated steps are there, as the plan has them

    step()
    yield "train", peak(step)
    model.gradient_checkpointing_enable()
    yield "train_checkpointed", peak(step)
