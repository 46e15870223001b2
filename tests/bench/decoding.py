"""Decoded tokens per second beside transformers, on a random Qwen2-VL of width 512 with 8 decoder layers.

    python -m tests.bench.decoding --output artifacts/benchmarks/decoding.json

All sides have the same random weights and generate greedily after the same prompt: 224 x 224 pixels of noise and some text,
in one row and in four. Eager, and ours compiled too. Counted are the tokens after the first, so without the prompt. The sides take turns, medians of
`--rounds`; what is compiled has compiled before (inductor), and graphs are counted before and after the rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import Qwen2VLForConditionalGeneration

from tests.bench.fresh import machine
from vlmbuild.builder.build import rewrite, trace_program
from vlmbuild.families import FAMILIES
from vlmbuild.recipe import Recipe
from vlmbuild.runtime.torch.model import VisionLanguageModel

SIDES = ("transformers", "vlmbuild", "vlmbuild, static, compiled")
WIDTH, LAYERS, TOKENS, IMAGE, START, END = 512, 8, 33, 7998, 7996, 7997


def models(dtype: torch.dtype) -> tuple[Any, Any]:
    """transformers' and ours."""
    family = FAMILIES["qwen2_vl"]
    text = {
        "vocab_size": 8000,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    config = family.config(
        {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "text_config": text,
            "vision_config": {"depth": 2, "embed_dim": 256, "hidden_size": WIDTH, "num_heads": 4},
            "tie_word_embeddings": True,
            "image_token_id": IMAGE,
            "video_token_id": IMAGE + 1,
            "eos_token_id": None,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
            "bos_token_id": None,
        }
    )
    torch.manual_seed(0)
    peer = Qwen2VLForConditionalGeneration(config).to(dtype).eval()
    program = trace_program(family, config, lambda *_: None)
    rewrite(program, Recipe(), dict, lambda *_: None)
    tensors = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    return peer, VisionLanguageModel(program, family, config, tensors, dtype).eval()


def batch(rows: int) -> dict[str, torch.Tensor]:
    """A picture of 16 x 16 patches in every row."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 7000, (2, rows, 20), generator=generator)
    picture = torch.tensor([START, *[IMAGE] * 64, END]).expand(rows, -1)
    ids = torch.cat([words[0], picture, words[1]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": torch.tensor([[1, 16, 16]] * rows),
        "pixel_values": torch.randn(rows * 256, 1176, generator=generator),
    }


def tokens_per_second(generate: Callable[[int], torch.Tensor], rows: int) -> float:
    """Of the tokens after the first."""
    seconds = []
    for count in (1, TOKENS):
        started = time.perf_counter()
        generate(count)
        seconds.append(time.perf_counter() - started)
    return rows * (TOKENS - 1) / (seconds[1] - seconds[0])


def measure(dtype: torch.dtype, rows: int, rounds: int) -> dict[str, Any]:
    """Medians of all sides, and whether they said the same."""
    inputs = batch(rows)
    plain = dict(zip(("transformers", "vlmbuild"), models(dtype), strict=True))
    compiled = copy.deepcopy(plain["vlmbuild"])
    compiled.compile()
    sides: dict[str, Callable[[int], torch.Tensor]] = {}
    for name in SIDES:
        model = compiled if "compiled" in name else plain[name]
        form = {"cache_implementation": "static", "max_cache_len": 192} if "static" in name else {}

        def generate(count: int, model: Any = model, form: dict[str, Any] = form) -> torch.Tensor:
            found: torch.Tensor = model.generate(
                **inputs, **form, max_new_tokens=count, do_sample=False, no_repeat_ngram_size=2, pad_token_id=0
            )
            return found

        sides[name] = generate
    answers = {name: side(TOKENS) for name, side in sides.items()}
    graphs = counters["stats"]["unique_graphs"]
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            speeds[name].append(tokens_per_second(side, rows))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "tokens_per_second": {name: round(median(found), 1) for name, found in speeds.items()},
        "same_tokens": all(torch.equal(found, answers["transformers"]) for found in answers.values()),
        "graphs_compiled_in_the_rounds": counters["stats"]["unique_graphs"] - graphs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    results = [measure(torch.float32, rows, arguments.rounds) for rows in arguments.rows]
    document = {"machine": machine(), "threads": torch.get_num_threads(), "decoding": results}
    print(json.dumps(document, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
