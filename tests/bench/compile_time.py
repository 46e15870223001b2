"""Compilation beside transformers: seconds to the first training step's gradients, and graphs over changing image sizes.

    python tests/bench/compile_time.py --repeats 3 --output artifacts/benchmarks/compile_time.json

Every measurement is a fresh process with empty compiler caches, the two sides in turn; both have the same random weights,
float32, one thread, inductor. The model is narrow (hidden size 256, head size 128, vision width 64), because the time of
interest is that of tracing and code generation, which width does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
    """`samples` rows with one image of a grid each; text before and after it, labels on the last tokens."""
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
    rewrite(program, Recipe(dtype="float32"), lambda *_: None)
    return VisionLanguageModel(program, family, config, theirs.state_dict(), torch.float32).train()


def measure(side: str, layers: int, depth: int, sizes: int) -> dict[str, Any]:
    """In this process: seconds from `torch.compile` to gradients, then the graphs that `sizes` shapes need."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.set_num_threads(1)
    model = make_model(side, layers, depth)
    first = make_batch(2, 4, 6)
    counter = CompileCounterWithBackend("inductor")
    torch._dynamo.config.cache_size_limit = 128  # so that the peer may compile as often as it wants
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


def run_fresh(side: str, layers: int, depth: int, sizes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", __file__, "--child", side, str(layers), str(depth), str(sizes)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{side:14} {layers:2} + {depth:2} layers  {result['seconds']:7.1f} s  graphs {result['frames']}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, *numbers = arguments.child
        print(json.dumps(measure(side, *map(int, numbers))))
        return
    cases = [("vlmbuild", 28, 32), ("transformers", 28, 32), ("vlmbuild", 4, 4)]
    seconds: dict[tuple[str, int, int], list[float]] = {case: [] for case in cases}
    for _ in range(arguments.repeats):
        for case in cases:
            seconds[case].append(run_fresh(*case, 0)["seconds"])
    shapes = {side: run_fresh(side, 2, 2, len(SIZES))["frames"] for side in ("vlmbuild", "transformers")}
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    full, small = medians["vlmbuild", 28, 32], medians["vlmbuild", 4, 4]
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "seconds_to_first_gradients": {f"{s} {a}+{b}": values for (s, a, b), values in seconds.items()},
        "transformers_over_vlmbuild": medians["transformers", 28, 32] / full,
        "vlmbuild_28_32_over_4_4": full / small,
        "graphs_after_each_of_8_shapes": shapes,
    }
    print(f"28 + 32 layers: transformers / vlmbuild {report['transformers_over_vlmbuild']:.1f}")
    print(f"vlmbuild, 28 + 32 over 4 + 4 layers: {report['vlmbuild_28_32_over_4_4']:.2f}")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
