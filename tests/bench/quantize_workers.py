"""The measurements of `quantize.py`, each run in a process of its own: `python -m tests.bench.quantize_workers NAME OPTIONS`.

A worker imports what its side needs before the clock starts, and prints one line of JSON. A peer that is not installed makes
the line {"absent": reason}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.fresh import PeakMemory, timed

TRANSFORMERS, VLMBUILD = "transformers", "vlmbuild"
_VOCABULARY = 150_000
_CHUNK_BYTES = 1 << 22


def build(
    side: str, checkpoint: str, output: str, quantized: bool = True, skip: list[str] | None = None
) -> dict[str, Any]:
    """Read, quantize and write. `skip` is the peer's: modules that stay as they are."""
    import_side(side)
    if side == TRANSFORMERS:
        return build_peer(checkpoint, output, skip or [])
    import vlmbuild
    from vlmbuild.recipe import QuantSpec, Recipe

    stages: dict[str, float] = {}
    last = started = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        stages[stage] = stages.get(stage, 0.0) + now - last
        last = now

    vlmbuild.build(checkpoint, output, Recipe(quantize=QuantSpec() if quantized else None), progress=progress)
    ended = time.perf_counter()
    return {"seconds": ended - started, "stages": stages | {"after the last report": ended - last}}


def build_peer(checkpoint: str, output: str, skip: list[str]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    started = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=config, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    model.save_pretrained(output)
    ended = time.perf_counter()
    return {"seconds": ended - started, "stages": {"load and quantize": loaded - started, "save": ended - loaded}}


def compare(ours: str, theirs: str) -> dict[str, Any]:
    """Compare all tensors of two checkpoints bit by bit, one at a time; names as transformers has them in memory.

    Counts, by kind, tensors in both and different ones. A weight's "scales" are its nested scales and offset: the
    offset is a mean over all scales, and the peer's sum of it depends on the number of threads.
    """
    from vlmbuild.artifact.weights_reader import CheckpointWeights
    from vlmbuild.families import family_of

    family = family_of(json.loads((Path(ours) / "config.json").read_text()), ours)
    sides = [CheckpointWeights(directory) for directory in (ours, theirs)]
    names = [{family.module_name(name): name for name in side.tensors} for side in sides]
    both, differ = Counter[str](), Counter[str]()
    for name in names[0].keys() & names[1].keys():
        kind = "scales" if ".weight." in name else "packed" if f"{name}.absmax" in names[0] else "plain"
        pair = [side.read(stored[name]) for side, stored in zip(sides, names, strict=True)]
        both[kind] += 1
        differ[kind] += not same_bits(*pair)
    only = [sorted(a.keys() - b.keys()) for a, b in (names, names[::-1])]
    return {"both": both, "differ": differ, "only_ours": only[0], "only_theirs": only[1]}


def same_bits(a: Any, b: Any) -> bool:
    import torch

    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def load(side: str, path: str, processor: str, verify: bool = False) -> dict[str, Any]:
    """Open a checkpoint and its processor; of the peer the tokenizer and the image processor, since its video processor
    needs torchvision. `model_seconds` is without them where that can be told."""
    import_side(side)
    started = time.perf_counter()
    model_seconds = None
    if side == VLMBUILD:
        import vlmbuild

        kept: Any = vlmbuild.load(path, verify=verify)
    else:
        from transformers import AutoImageProcessor, AutoTokenizer

        model = open_model(side, path)
        model_seconds = time.perf_counter() - started
        tokenizer = AutoTokenizer.from_pretrained(processor)
        kept = model, tokenizer, AutoImageProcessor.from_pretrained(processor, backend="pil")
    seconds = time.perf_counter() - started
    del kept
    return {"seconds": seconds, "model_seconds": model_seconds}


def hash_files(path: str) -> dict[str, Any]:
    """SHA-256 of every file, one thread a file at a time on all cores: the least that a verification costs."""
    files = [file for file in Path(path).rglob("*") if file.is_file()]
    started = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_digest, sorted(files, key=lambda file: -file.stat().st_size)))
    return {"seconds": time.perf_counter() - started, "bytes": sum(file.stat().st_size for file in files)}


def _digest(file: Path) -> str:
    digest = sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def forward(side: str, path: str, tokens: int = 256) -> dict[str, Any]:
    """Run forward passes in evaluation mode without gradients: seconds of each, and logits to compare the sides."""
    import torch

    model, batch = open_model(side, path).eval(), text_batch(tokens)
    extra = {} if side == VLMBUILD else {"use_cache": False}
    with torch.no_grad():
        logits = model(**batch, **extra).logits[0, -1].float()
        seconds = timed(lambda: model(**batch, **extra))
    return {"runs": seconds, "logits": logits[:4096].tolist()}


def backward(side: str, path: str, tokens: int = 256) -> dict[str, Any]:
    """Forward and backward with LoRA of rank 16 on the language model's linear layers, in training mode."""
    model, batch = open_model(side, path), text_batch(tokens)
    if side == VLMBUILD:
        import vlmbuild

        vlmbuild.add_lora(model, r=16)
    else:
        from peft import LoraConfig, get_peft_model

        layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers))
    model.train()
    losses = []

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())

    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"runs": timed(step), "loss": losses[0], "trainable": trainable}


def decode(side: str, path: str) -> dict[str, Any]:
    """Decode one token per forward pass, and time transformers' cached generation for each of 16 tokens behind a prompt of 16."""
    import torch

    model, batch, prompt = open_model(side, path).eval(), text_batch(1), text_batch(16)
    extra = {} if side == VLMBUILD else {"use_cache": False}
    with torch.no_grad():
        result: dict[str, Any] = {"runs": timed(lambda: model(**batch, **extra), warm_ups=2, least=5)}
        if side == TRANSFORMERS:
            model.generation_config.eos_token_id = None
            calls = [partial(model.generate, **prompt, do_sample=False, max_new_tokens=count) for count in (17, 1)]
            long, short = (median(timed(call)) for call in calls)
            result["generate"] = (long - short) / 16
    return result


def bandwidth() -> dict[str, Any]:
    """Measure bytes per second that this many threads read (a sum over 1 GB) and copy (read and write counted)."""
    import torch

    values = torch.ones(250_000_000)
    other = torch.empty_like(values)
    read = min(timed(values.sum, least=5))
    copied = min(timed(lambda: other.copy_(values), least=5))
    return {"read": values.nbytes / read, "copy": 2 * values.nbytes / copied, "threads": torch.get_num_threads()}


def open_model(side: str, path: str) -> Any:
    import torch

    if side == VLMBUILD:
        import vlmbuild

        return vlmbuild.load(path, verify=False)[0]
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16)


def text_batch(tokens: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(_VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def import_side(side: str) -> None:
    """Import everything that the timed call would import."""
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, Qwen2VLForConditionalGeneration  # noqa: F401

    if side == VLMBUILD:
        import vlmbuild

        _ = vlmbuild.build, vlmbuild.load
    else:
        import_module("accelerate")


WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    worker.__name__: worker for worker in (build, compare, load, hash_files, forward, backward, decode, bandwidth)
}


def main() -> None:
    worker, options = sys.argv[1], json.loads(sys.argv[2])
    with PeakMemory() as memory:
        try:
            result = WORKERS[worker](**options)
        except ImportError as error:
            if options.get("side") != TRANSFORMERS:
                raise
            result = {"absent": str(error)}
    print(json.dumps(result | memory.figures()))


if __name__ == "__main__":
    main()
