"""The sides of `training.py`, each run in a process of its own: `python -m tests.bench.training_workers SIDE OPTIONS`.

A worker imports what its side needs before the clock starts, trains on the batches that the options name, and prints one line
of JSON. A peer that cannot run here makes the line {"absent": reason}.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.bench.fresh import PeakMemory, status_bytes

LEARNING_RATE = 1e-4
IMAGE, START, END = 151655, 151652, 151653
MERGE, PIXELS = 2, 1176


def lengths(seed: int, count: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Return (prompt tokens, answer tokens, grids of images) of samples, as visual instruction data has them: most have one image,
    some two or none, of many sizes and shapes (256 to 1,024 patches); prompts and answers are log-normal, with long tails."""
    import numpy as np

    random = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        images = int(random.choice([0, 1, 2], p=[0.15, 0.7, 0.15]))
        grids = []
        for _ in range(images):
            area, ratio = random.uniform(256, 1024), float(np.exp(random.normal(0, 0.35)))
            height = max(1, round((area * ratio) ** 0.5 / MERGE)) * MERGE
            grids.append((height, max(1, round(area / height / MERGE)) * MERGE))
        prompt, answer = (int(np.clip(np.exp(random.normal(np.log(mean), 0.9)), 8, 512)) for mean in (30, 60))
        samples.append((prompt, answer, grids))
    return samples


def batches(seed: int, count: int, samples: int) -> Iterator[dict[str, Any]]:
    """Batches padded on the right, as the processor and a collator make them; labels on answers only."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = lengths(seed, count * samples)
    for number in range(count):
        rows, labels, grids = [], [], []
        for prompt, answer, images in drawn[number * samples : (number + 1) * samples]:
            row = torch.randint(0, 150_000, (prompt,), generator=generator).tolist()
            for height, width in images:
                row += [START, *[IMAGE] * (height * width // MERGE**2), END]
            said = torch.randint(0, 150_000, (answer,), generator=generator).tolist()
            rows.append(row + said)
            labels.append([-100] * len(row) + said)
            grids += [(1, height, width) for height, width in images]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        batch = {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            "mm_token_type_ids": (ids == IMAGE).int(),
            "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
        }
        if grids:
            batch["image_grid_thw"] = torch.tensor(grids)
            patches = int(batch["image_grid_thw"].prod(-1).sum())
            batch["pixel_values"] = torch.randn(patches, PIXELS, generator=generator)
        yield batch


def ours(options: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """Load an artifact with the adapter; `compile` compiles its regions."""
    import vlmbuild

    model, _ = vlmbuild.load(options["artifact"], verify=False, dtype=options["dtype"])
    vlmbuild.load_adapter(model, options["adapter"])
    if options["checkpointing"]:
        model.gradient_checkpointing_enable()
    if options["compile"]:
        model.compile()
    return model.train(), model


def peer(options: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """Load transformers' model with bitsandbytes and PEFT, as their documentation has it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    if options["liger"]:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2_vl

        apply_liger_kernel_to_qwen2_vl()
    model = AutoModelForImageTextToText.from_pretrained(
        options["artifact"], dtype=getattr(torch, options["dtype"]), attn_implementation="sdpa"
    )
    if options["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = PeftModel.from_pretrained(model, options["adapter"], is_trainable=True).train()
    return model, torch.compile(model) if options["compile"] else model


SIDES: dict[str, Callable[[dict[str, Any]], tuple[Any, Callable[..., Any]]]] = {"vlmbuild": ours, "transformers": peer}


def imported(side: str, options: dict[str, Any]) -> None:
    """Import what the side needs, so that the clock does not count it."""
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForImageTextToText, Qwen2VLForConditionalGeneration  # noqa: F401

    import vlmbuild

    getattr(vlmbuild, "load")  # noqa: B009
    if options["compile"]:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # what another run has compiled must not help
        torch._dynamo.config.recompile_limit = 128  # the peer's graphs are many; at the limit it would run eagerly


def run(side: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train `steps` steps. Seconds of every step; the first step's counts from before loading too."""
    import torch

    imported(side, options)
    data = list(batches(options["seed"], options["steps"], options["samples"]))
    base = status_bytes("VmRSS")
    seconds, losses = [], []
    with PeakMemory() as memory:
        started = time.perf_counter()
        try:
            model, call = SIDES[side](options)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
            for batch in data:
                begun = time.perf_counter()
                loss = call(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
                seconds.append(time.perf_counter() - begun)
                if len(seconds) == 1:
                    first = time.perf_counter() - started
                if time.perf_counter() - started > options["limit"]:
                    break
        except Exception as error:  # a peer that does not run here is a result, not a failure
            if side == "vlmbuild":
                raise
            said = re.sub(r" \(/.*?\)", "", str(error).strip().splitlines()[0])  # the path of an ImportError
            return {"absent": f"{type(error).__name__}: {said[:200]}"}
        peaks = memory.figures()
    graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return {
        "first_step": first,
        "seconds": seconds,
        "losses": losses,
        "imports_resident": base,
        **peaks,
        "compilations": graphs,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], json.loads(sys.argv[2]))))
