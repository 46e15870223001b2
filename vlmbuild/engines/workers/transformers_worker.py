"""Run transformers on a checkpoint: hooks read the stages."""

from __future__ import annotations

from functools import partial
from typing import Any

import exchange
import processing


def first_tensor(value: Any) -> Any:
    """Return the tensor of a module's argument or result, which may be the first of several."""
    if hasattr(value, "pooler_output") and value.pooler_output is not None:
        value = value.pooler_output
    while isinstance(value, list | tuple):
        value = value[0]
    return getattr(value, "last_hidden_state", value)


def run(model: Any, processor: Any, job: dict[str, Any], case: exchange.Case) -> None:
    """Run one case."""
    case.enter("tokens")
    inputs = processing.prompt(processor, case.given)
    case.shown["tokens"] = inputs["input_ids"][0].tolist()
    if "pixel_values" in inputs:
        case.value("pixels", inputs["pixel_values"].float().numpy())
    inputs = inputs.to(model.dtype)  # of pixels; integers stay
    case.enter("logits")
    logits = with_hooks(model, inputs, case)
    case.value("logits", logits[0, -job["last"] :].float().numpy())
    case.enter("greedy")
    generated = model.generate(**inputs, max_new_tokens=job["steps"], do_sample=False)
    case.shown["greedy"] = generated[0, inputs["input_ids"].shape[1] :].tolist()


def with_hooks(model: Any, inputs: Any, case: exchange.Case) -> Any:
    """Run a prompt, and write the values of the stages."""
    import torch

    kept: dict[str, Any] = {}

    def keep(stage: str, value: Any) -> None:
        kept.setdefault(stage, first_tensor(value).detach().float())

    handles = []
    for stage, (path, side) in case.given["modules"].items():
        module = model.get_submodule(path)
        if side == "input":
            hook = partial(lambda name, _, args, kwargs: keep(name, args or list(kwargs.values())), stage)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(partial(lambda name, _, __, result: keep(name, result), stage)))
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
        for stage, value in kept.items():
            case.value(stage, value.reshape(-1, value.shape[-1]).numpy())
    return logits


def main() -> None:
    """Open the model, and run every case."""
    job = exchange.read_job()
    torch, transformers, _ = exchange.require("torch", "transformers", "PIL")
    torch.manual_seed(0)
    processor: Any = None

    def each(case: exchange.Case) -> None:
        nonlocal processor
        processor = processor or processing.open_processor(job["model"])
        run(model, processor, job, case)

    # Layers of bitsandbytes compute in the dtype with which they were stored, which the others must share, and its kernels for
    # CPUs round scales to bfloat16.
    config = transformers.AutoConfig.from_pretrained(job["model"])
    stored = (getattr(config, "quantization_config", None) or {}).get("quant_method") == "bitsandbytes"
    dtype = "auto" if stored else torch.float32
    model = transformers.AutoModelForImageTextToText.from_pretrained(job["model"], dtype=dtype).eval()
    exchange.answer(job, transformers.__version__, each, "bfloat16" if stored else "float32")


if __name__ == "__main__":
    exchange.start(main)
