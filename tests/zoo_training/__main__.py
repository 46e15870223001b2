"""Train a tiny checkpoint: `python -m tests.zoo_training OUTPUT [--family F] [--warm-up N] [--steps N] [--seed N]`, and train
one further: `python -m tests.zoo_training OUTPUT --family F --resume DIRECTORY --warm-up 0 --steps N --seed N --peak RATE`.

Everything is made here from a seed: the byte-level tokenizer with the family's special tokens, the processor's files, the
model of about a million parameters, and the training itself, with transformers' own model class. The model is randomly
initialised, or has weights of other checkpoints of the zoo where the layers are the same (`start.py`).
Writes an ordinary checkpoint in the published layout and `training.json` with the script's arguments and figures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from tests.zoo_training import mllama, pixtral, qwen2_vl, qwen3_vl, smolvlm
from tests.zoo_training.probe import ZooFamily, warm_up
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import READ, exact_match, training_batch

FAMILIES: dict[str, ZooFamily] = {
    "qwen2_vl": qwen2_vl,
    "mllama": mllama,
    "pixtral": pixtral,
    "qwen3_vl": qwen3_vl,
    "smolvlm": smolvlm,
}
DEFAULT_FAMILY = "qwen2_vl"
PEAK = 2e-3
"""Highest learning rate of the language loss."""
BATCH = 64
"""Samples of a step."""


def fit(model: Any, processor: Any, steps: int, seed: int, batch_size: int, peak: float) -> list[dict[str, Any]]:
    """Train the whole model on the language loss; the log has a row for every 250 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    stream, held_out = Digits("train", seed, augment=True), Digits("held_out", seed).take(500)
    log: list[dict[str, Any]] = []
    started, running = time.time(), 0.0
    for step in range(1, steps + 1):
        loss = model(**training_batch(processor, READ, stream.take(batch_size))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running = 0.98 * running + 0.02 * loss.item() if step > 1 else loss.item()
        if step % 250 == 0 or step == steps:
            log.append(
                {"step": step, "loss": round(running, 4), "exact_match": exact_match(model, processor, READ, held_out)}
            )
            print(log[-1], f"{time.time() - started:.0f} s", flush=True)
    return log


def train(
    output: Path,
    name: str,
    steps: int,
    warm_up_steps: int,
    seed: int,
    peak: float = PEAK,
    resume: Path | None = None,
    batch_size: int = BATCH,
) -> None:
    """Train from scratch, or from a checkpoint's weights, and write the checkpoint."""
    torch.manual_seed(seed)
    family = FAMILIES[name]
    processor = family.make_processor()
    model = family.make_model(family.make_config(processor.tokenizer))
    if resume is not None:
        model = type(model).from_pretrained(resume, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    stream = Digits("train", seed + 1, augment=True)
    if warm_up_steps:
        warm_up(family, model, processor, stream, warm_up_steps, batch_size, 1.5 * peak)
    log = fit(model, processor, steps, seed, batch_size, peak)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(output)
    processor.save_pretrained(output)
    final = exact_match(model.float(), processor, READ, Digits("held_out", seed + 1).take(1000))
    options = f"--warm-up {warm_up_steps} --steps {steps} --seed {seed}" + ("" if peak == PEAK else f" --peak {peak}")
    options += "" if batch_size == BATCH else f" --batch {batch_size}"
    chosen = "" if name == DEFAULT_FAMILY else f"--family {name} "
    before = {}
    if resume is not None:
        chosen += "--resume BEFORE "
        before = {"before": json.loads((resume / "training.json").read_text())}
    record = {
        **before,
        "command": f"python -m tests.zoo_training OUTPUT {chosen}{options}",
        "held_out_exact_match": final,
        "held_out_samples": 1000,
        "log": log,
        "torch": torch.__version__,
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print("held-out exact match", final, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default=DEFAULT_FAMILY)
    parser.add_argument("--warm-up", type=int, help="default: the family's own")
    parser.add_argument("--steps", type=int, help="default: the family's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, default=PEAK)
    parser.add_argument("--batch", type=int, default=BATCH, help="samples of a step")
    parser.add_argument("--resume", type=Path, metavar="DIRECTORY", help="a checkpoint that this made")
    arguments = parser.parse_args()
    defaults = FAMILIES[arguments.family]
    warm_up_steps = defaults.WARM_UP_STEPS if arguments.warm_up is None else arguments.warm_up
    steps = defaults.STEPS if arguments.steps is None else arguments.steps
    rest = (arguments.seed, arguments.peak, arguments.resume, arguments.batch)
    train(arguments.output, arguments.family, steps, warm_up_steps, *rest)
