"""Qwen2-VL with random weights: transformers' model, and ours on the same tensors; batches of text and images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tests.gpu.measure.record import MissingError, Run, Setting

CONFIGS = Path(__file__).parents[2] / "configs"
SIDE, TOKENS_AN_IMAGE = 32, 256
"""Patches along a side of an image of 448 x 448 pixels, and its tokens."""
PIXELS = 1176


def config_values(setting: Setting, size: str) -> dict[str, Any]:
    """Return the published config.json, "2b" or "7b"; a tiny one in the rehearsal."""
    if setting.small:
        import tiny

        return tiny.config_values(layers=1, depth=1, tied=False) | {"eos_token_id": None}
    values: dict[str, Any] = json.loads((CONFIGS / f"qwen2-vl-{size}" / "config.json").read_text())
    return values


def make_config(setting: Setting, size: str) -> Any:
    """Make the family's config, without the token that ends generation."""
    from vlmbuild.families import FAMILIES

    return FAMILIES["qwen2_vl"].config(config_values(setting, size) | {"eos_token_id": None})


def random_peer(setting: Setting, config: Any, nf4: bool, dtype: torch.dtype) -> Any:
    """Make transformers' model on the device; with `nf4` its decoder layers are bitsandbytes' Linear4bit."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if nf4:
        for module in list(model.model.language_model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, _quantized(child, dtype))
        model.is_loaded_in_4bit = True  # PEFT looks here
    return model


def _quantized(layer: nn.Linear, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    new = Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    data, device = layer.weight.data, layer.weight.device
    new.weight = Params4bit(data, requires_grad=False, quant_type="nf4", blocksize=64, module=new).to(device)
    new.bias = layer.bias
    return new


def ours_from(peer: Any, config: Any, nf4: bool, dtype: torch.dtype) -> Any:
    """Bind our program to the tensors of a peer that has no adapter."""
    from vlmbuild.builder import build
    from vlmbuild.families import FAMILIES
    from vlmbuild.quant.decide import decide
    from vlmbuild.recipe import QuantSpec, Recipe
    from vlmbuild.runtime.torch.model import VisionLanguageModel

    family, silent = FAMILIES["qwen2_vl"], lambda *_: None
    recipe = Recipe(dtype=str(dtype).removeprefix("torch."), quantize=QuantSpec() if nf4 else None)
    program = build.trace_program(family, config, silent)
    build.rewrite(program, recipe, lambda: decide(program, recipe.quantize), silent)
    tensors = {name: tensor.detach() for name, tensor in peer.state_dict().items()}
    for name, module in peer.named_modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            tensors[f"{name}.weight_absmax"] = state.absmax
            tensors[f"{name}.weight_nested_absmax"] = state.state2.absmax
            tensors[f"{name}.weight_nested_offset"] = state.offset
    return VisionLanguageModel(program, family, config, tensors, dtype).to(peer.device)


def make_batch(setting: Setting, config: Any, samples: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Make a batch padded on the right, with labels on text.

    Args:
        setting: Has the device.
        config: Has the token ids.
        samples: Text tokens and images of each sample.
    """
    side = 4 if setting.small else SIDE
    image = [config.vision_start_token_id, *[config.image_token_id] * (side * side // 4), config.vision_end_token_id]
    generator = torch.Generator().manual_seed(1)
    words = min(config.vision_start_token_id, 150_000) - 16
    rows = [torch.randint(0, words, (text,), generator=generator).tolist() for text, _ in samples]
    rows = [image * images + row for row, (_, images) in zip(rows, samples, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == config.image_token_id).int()}
    batch["labels"] = ids.masked_fill((mask == 0) | (ids >= words), -100)
    if count := sum(images for _, images in samples):
        batch["image_grid_thw"] = torch.tensor([[1, side, side]] * count)
        batch["pixel_values"] = torch.randn(count * side * side, PIXELS, generator=generator)
    return {name: value.to(setting.device) for name, value in batch.items()}


def train_step(
    model: Callable[..., Any], parameters: Sequence[nn.Parameter], batch: dict[str, Tensor]
) -> Callable[[], float]:
    """Return a call that makes one AdamW step and returns the loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def seconds_of(setting: Setting, call: Run, warm_ups: int = 2, repeats: int = 5) -> float:
    """Median seconds of a call that ends when the device has finished."""
    if setting.small:
        warm_ups, repeats = 0, 1
    for _ in range(warm_ups):
        call()
    seconds = []
    for _ in range(repeats):
        _wait(setting)
        started = time.perf_counter()
        call()
        _wait(setting)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give cached memory back, so that the next side starts like the first."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def needs_gpu(setting: Setting, reason: str) -> None:
    """Raise MissingError in the rehearsal."""
    if setting.small:
        raise MissingError(reason)
