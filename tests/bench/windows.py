"""Attention within the windows of a vision tower, beside transformers' way of computing it on a CPU.

    python -m tests.bench.windows --rounds 5 --output artifacts/benchmarks/windows.json

One layer of Qwen2.5-VL's tower on an image of 2,000 x 2,000 pixels: 142 x 142 patches in windows of 8 x 8, those at two edges
cut; 16 heads of 80, float32, one thread. Both sides get query, key and value as the layer makes them, and bounds of windows;
transformers splits them per window and calls its SDPA on each. Every measurement is a fresh process, the sides in turn. The last
rows are windows of text: one row of tokens that see 1,024 before them, where transformers makes a square mask.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.fresh import PeakMemory, bar, interleave, machine, medians, print_bars, run_fresh, timed, write_report

GRID, WINDOW_PIXELS, PATCH, MERGE = (1, 142, 142), 112, 14, 2
HEADS, DIM = 16, 80
TOKENS, TEXT_WINDOW, TEXT_DIM = 8192, 1024, 128
SIDES = ("vlmbuild", "transformers")
FIGURES = ("forward", "forward_backward", "peak_anonymous")


def tower(side: str) -> tuple[Callable[..., Any], list[Any]]:
    """Return a side's attention within windows, and query, key and value."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.vision_utils import get_vision_window_index

    import vlmbuild.ops  # noqa: F401

    _, bounds = get_vision_window_index(torch.tensor([GRID]), MERGE, WINDOW_PIXELS, PATCH)
    patches, module = int(bounds[-1]), torch.nn.Module()
    states = torch.randn(patches, 3, HEADS, DIM).unbind(1)
    inputs = [x.transpose(0, 1).unsqueeze(0).requires_grad_() for x in states]

    def ours(query: Any, key: Any, value: Any) -> Any:
        return torch.ops.vlmbuild.attention_auto(query, key, value, None, bounds, None, None, False, DIM**-0.5)

    def theirs(query: Any, key: Any, value: Any) -> Any:
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        splits = [torch.split(x, lengths, dim=2) for x in (query, key, value)]
        attend = partial(sdpa_attention_forward, module, attention_mask=None, scaling=DIM**-0.5, is_causal=False)
        return torch.cat([attend(q, k, v)[0] for q, k, v in zip(*splits, strict=True)], dim=1)

    return (ours if side == "vlmbuild" else theirs), inputs


def text(side: str) -> tuple[Callable[..., Any], list[Any]]:
    """Return a side's attention of tokens that see a window before them, and query, key and value."""
    import torch
    from transformers import MistralConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import create_sliding_window_causal_mask

    import vlmbuild.ops  # noqa: F401

    bounds, module = torch.tensor([0, TOKENS, TOKENS], dtype=torch.int32), torch.nn.Module()
    inputs = [torch.randn(1, TOKENS, 4, TEXT_DIM).transpose(1, 2).requires_grad_() for _ in range(3)]
    config = MistralConfig(sliding_window=TEXT_WINDOW)
    config._attn_implementation = "sdpa"

    def ours(query: Any, key: Any, value: Any) -> Any:
        masks = (None, bounds, None, None)
        options = (True, TEXT_DIM**-0.5, None, TEXT_WINDOW)
        return torch.ops.vlmbuild.attention_auto(query, key, value, *masks, *options)

    def theirs(query: Any, key: Any, value: Any) -> Any:
        mask = create_sliding_window_causal_mask(config, torch.empty(1, TOKENS, 1), None, None)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=TEXT_DIM**-0.5)[0]

    return (ours if side == "vlmbuild" else theirs), inputs


PARTS = {"tower": tower, "text": text}


def worker(side: str, part: str) -> dict[str, Any]:
    """Measure one side: seconds of forward, and of forward and backward."""
    import torch

    torch.manual_seed(0)
    attend, inputs = PARTS[part](side)

    def step() -> None:
        torch.autograd.grad(attend(*inputs).sum(), inputs)

    with PeakMemory() as memory, torch.no_grad():
        forward = timed(lambda: attend(*inputs))
        with torch.enable_grad():
            both = timed(step)
        total = float(attend(*inputs).double().square().sum())
    return {"forward": _middle(forward), "forward_backward": _middle(both), "sum": total, **memory.figures()}


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cases = {
        f"{part}, {side}": partial(run_fresh, "tests.bench.windows", side, 1, part=part)
        for part in arguments.parts
        for side in SIDES
    }
    results = interleave(cases, arguments.rounds)
    found = {case: medians(rows, FIGURES) for case, rows in results.items()}
    bars = []
    for part in arguments.parts:
        ours, theirs = (found[f"{part}, {side}"] for side in SIDES)
        bars += [
            bar(f"{part}, {name}: transformers / vlmbuild", ">= 1", theirs[name] / ours[name]) for name in FIGURES[:2]
        ]
        sums = [results[f"{part}, {side}"][0]["sum"] for side in SIDES]
        bars.append(bar(f"{part}, sums of squares: relative difference", "<= 1e-5", abs(sums[0] / sums[1] - 1)))
    print_bars(bars)
    write_report(arguments.output, machine() | {"rounds": arguments.rounds, "results": found, "bars": bars})


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].startswith("{"):
        print(json.dumps(worker(sys.argv[1], **json.loads(sys.argv[2]))))
    else:
        main()
