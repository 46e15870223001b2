"""Generated tokens per second of Qwen2-VL-2B shapes beside transformers, greedy, with the same random weights."""

from __future__ import annotations

import time
from typing import Any

import torch

from tests.gpu.measure import qwen
from tests.gpu.measure.record import Record, Row, Setting

PROMPT, TOKENS = 512, 65
ROWS = (1, 8)
SIDES = {
    "transformers": {},
    "vlmbuild": {},
    "vlmbuild, static cache": {"cache_implementation": "static"},
    "vlmbuild, static cache, compiled": {"cache_implementation": "static"},
}


def run(record: Record, setting: Setting) -> None:
    """Time the tokens after the first, so without the prompt; the compiled side last."""
    dtype = torch.float32 if setting.small else setting.dtype
    models: dict[str, Any] = {}
    with record.row("weights", layers="all", weights="random"):
        config = qwen.make_config(setting, "2b")
        peer = qwen.random_peer(setting, config, False, dtype).eval()
        models = {"transformers": peer, "vlmbuild": qwen.ours_from(peer, config, False, dtype).eval()}
    theirs: dict[int, float] = {}
    for side, options in SIDES.items() if models else ():
        for rows in (1,) if setting.small else ROWS:
            with record.row(f"{side}: {rows} rows") as row:
                model = models[side.partition(",")[0]]
                if "compiled" in side and rows == 1:
                    model.compile(backend=setting.backend)
                row |= _measure(setting, config, model, rows, options)
                if side == "transformers":
                    theirs[rows] = row["tokens_per_second"]
                elif rows in theirs:
                    ratio = row["tokens_per_second"] / theirs[rows]
                    row["peers"] = {"transformers": {"tokens_per_second": theirs[rows], "ratio": round(ratio, 3)}}


def _measure(setting: Setting, config: Any, model: Any, rows: int, options: dict[str, Any]) -> Row:
    prompt, tokens = (6, 4) if setting.small else (PROMPT, TOKENS)
    batch = qwen.make_batch(setting, config, [(prompt, 0)] * rows)
    del batch["labels"]
    if options:
        options = options | {"max_cache_len": prompt + tokens}

    def seconds(count: int) -> float:
        started = time.perf_counter()
        answer = model.generate(**batch, **options, max_new_tokens=count, do_sample=False, pad_token_id=0)
        answer.cpu()
        return time.perf_counter() - started

    if not setting.small:
        seconds(tokens)  # compiles, and fills caches
    best = max(rows * (tokens - 1) / max(1e-9, seconds(tokens) - seconds(1)) for _ in range(1 if setting.small else 2))
    return {"prompt": prompt, "tokens": tokens, "tokens_per_second": best, "ms": 1e3 * rows / best}
