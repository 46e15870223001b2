"""Answer one prompt with images from an artifact, streaming the text while it is generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.runtime.load import load
from vlmbuild.train.images import open_image


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        text: Text without special tokens.
        prompt_tokens: Tokens of the prompt, images included.
        new_tokens: Tokens of the answer, the end token included.
        seconds: Seconds from the prompt to the last token.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float


def answer(
    artifact: Path,
    prompt: str,
    images: Sequence[str | Path] = (),
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    device: str | None = None,
    trust: Collection[str] = (),
    write: Callable[[str], None] = lambda _text: None,
) -> Answer:
    """Load an artifact and answer one prompt.

    Args:
        artifact: Folder of the artifact.
        prompt: Text of the user's turn, after the images.
        images: Files or URLs.
        max_new_tokens: Limit on the tokens of the answer.
        temperature: Sampling temperature; 0 means greedy decoding.
        device: "cpu" or "cuda"; None is the CPU.
        trust: Trust of `vlmbuild.load`.
        write: Called with each chunk of the answer as soon as its words are complete.

    Raises:
        UsageError: The artifact's processor has no chat template.
        BatchError: An image cannot be read, or the processor refuses it.
        IntegrityError, TrustError, IncompatibleError, DeviceError: See `vlmbuild.load`.
    """
    pictures = [open_image(image, "--image") for image in images]
    model, processor = load(artifact, device=device, trust=trust)
    batch = _batch(processor, prompt, pictures)
    streamer = _Streamer(processor.tokenizer, write)
    started = time.perf_counter()
    ids = generate(model, processor, batch, max_new_tokens=max_new_tokens, temperature=temperature, streamer=streamer)
    seconds = time.perf_counter() - started
    new = ids[0, batch["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(new, skip_special_tokens=True)
    return Answer(text.strip(), batch["input_ids"].shape[1], len(new), seconds)


class _Streamer(TextStreamer):
    """Passes the text of the answer on, without the prompt."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def generate(model: Any, processor: Any, batch: dict[str, Tensor], *, temperature: float, **options: Any) -> Tensor:
    """Generate until an end token of generation_config.json, or of the tokenizer if there is none."""
    config, tokenizer = model.generation_config, processor.tokenizer
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    tokens: Tensor = model.generate(
        **{name: tensor.to(model.device) for name, tensor in batch.items()},
        eos_token_id=ends,
        pad_token_id=first_end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **(sampling if temperature else greedy),
        **options,
    )
    return tokens


def _batch(processor: Any, prompt: str, images: Sequence[Any]) -> dict[str, Tensor]:
    if not getattr(processor, "chat_template", None):
        raise UsageError(
            "The artifact's processor has no chat template to format the prompt with. Build from a checkpoint that was "
            "tuned on conversations."
        )
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    try:
        batch = processor(
            text=[text], **({"images": [list(images)]} if images else {}), add_special_tokens=False, return_tensors="pt"
        )
    except ValueError as error:
        raise BatchError(f"--image: the artifact's processor refuses the images: {error}") from error
    return {name: tensor for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}
