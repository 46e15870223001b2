"""Compilation beside transformers: seconds to the first training step's gradients, and graphs over changing image sizes.

    python -m tests.bench.compile_time --repeats 3 --output artifacts/benchmarks/compile_time.json

Every measurement is a fresh process with empty compiler caches, the two sides in turn; both have the same random weights,
float32, one thread, inductor. The model is narrow (hidden size 256, head size 128, vision width 64): width does not change
the time of tracing and code generation. `--layers 1 1` is a quick look at the script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.fresh import interleave, machine, run_fresh, write_report

SIZES = ((4, 6), (8, 2), (6, 6), (2, 2), (10, 4), (4, 12), (8, 8), (6, 10))
BATCHES = (1, 2, 3, 1, 2, 4, 1, 2)


def model_config(layers: int, depth: int) -> Any:
    from vlmbuild.families import FAMILIES

    text = {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 192,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"depth": depth, "embed_dim": 64, "hidden_size": 256, "num_heads": 2}
    values = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "image_token_id": 318,
        "video_token_id": 319,
        "vision_start_token_id": 316,
        "vision_end_token_id": 317,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return FAMILIES["qwen2_vl"].config(values)


def make_batch(samples: int, height: int, width: int) -> dict[str, Any]:
    """Make `samples` rows with one image each; text before and after it, labels on the last tokens."""
    import torch

    features = height * width // 4
    row = [5, 6, 7, 316, *[318] * features, 317, 8, 9, 10, 11]
    ids = torch.tensor([row] * samples)
    labels = ids.clone()
    labels[:, :-3] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 318).int(),
        "pixel_values": torch.randn(samples * height * width, 1176),
        "image_grid_thw": torch.tensor([[1, height, width]] * samples),
        "labels": labels,
    }


def make_model(side: str, layers: int, depth: int) -> Any:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    from vlmbuild.builder.build import rewrite, trace_program
    from vlmbuild.families import FAMILIES
    from vlmbuild.recipe import Recipe
    from vlmbuild.runtime.torch.model import VisionLanguageModel

    torch.manual_seed(0)
    config = model_config(layers, depth)
    theirs = Qwen2VLForConditionalGeneration(config).float().train()
    if side == "transformers":
        return theirs
    family = FAMILIES["qwen2_vl"]
    program = trace_program(family, config, lambda *_: None)
    rewrite(program, Recipe(dtype="float32"), dict, lambda *_: None)
    return VisionLanguageModel(program, family, config, theirs.state_dict(), torch.float32).train()


def measure(side: str, layers: int, depth: int, sizes: int) -> dict[str, Any]:
    """Seconds from `torch.compile` to gradients in this process, then the graphs that `sizes` shapes need."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.set_num_threads(1)
    model = make_model(side, layers, depth)
    first = make_batch(2, 4, 6)
    counter = CompileCounterWithBackend("inductor")
    torch._dynamo.config.cache_size_limit = 128  # so that the peer may compile as often as it needs
    started = time.perf_counter()
    compiled = torch.compile(model, backend=counter)
    compiled(**first).loss.backward()
    seconds = time.perf_counter() - started
    frames = []
    for samples, (height, width) in list(zip(BATCHES, SIZES, strict=True))[:sizes]:
        model.zero_grad()
        compiled(**make_batch(samples, height, width)).loss.backward()
        frames.append(counter.frame_count)
    return {"seconds": seconds, "frames": frames}


def worker(side: str, layers: int, depth: int, sizes: int) -> dict[str, Any]:
    """Measure with empty compiler caches."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        return measure(side, layers, depth, sizes)


def fresh(side: str, layers: int, depth: int, sizes: int = 0) -> dict[str, Any]:
    options = {"layers": layers, "depth": depth, "sizes": sizes}
    return run_fresh("tests.bench.compile_time", side, 1, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs=2, default=(28, 32), help="decoder layers and vision blocks")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    large, small = tuple(arguments.layers), (4, 4)
    cases = {
        f"{side} {layers}+{depth}": partial(fresh, side, layers, depth)
        for side, (layers, depth) in (("vlmbuild", large), ("transformers", large), ("vlmbuild", small))
    }
    results = interleave(cases, arguments.repeats)
    seconds = {case: [row["seconds"] for row in rows] for case, rows in results.items()}
    ours, theirs, shallow = (median(values) for values in seconds.values())
    report = machine() | {
        "seconds_to_first_gradients": seconds,
        "transformers_over_vlmbuild": theirs / ours,
        "vlmbuild_large_over_4_4": ours / shallow,
        "graphs_after_each_of_8_shapes": {
            side: fresh(side, 2, 2, len(SIZES))["frames"] for side in ("vlmbuild", "transformers")
        },
    }
    print(json.dumps(report, indent=1))
    write_report(arguments.output, report)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].startswith("{"):
        print(json.dumps(worker(sys.argv[1], **json.loads(sys.argv[2]))))
    else:
        main()
