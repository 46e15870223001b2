"""Batches to check exported models with: images of several sizes, and texts, made by the artifact's processor."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmbuild.errors import SourceError
from vlmbuild.families import Family
from vlmbuild.families.chat import question_text

SEED = 0
_SAMPLES: dict[str, tuple[tuple[str, tuple[tuple[int, int], ...]], ...]] = {
    "one image": (("What is in the picture?", ((112, 84),)),),
    "several images, padded": (
        ("Compare the two pictures.", ((168, 56), (56, 140))),
        ("And this one?", ((84, 196),)),
    ),
    "some without image": (("Describe it.", ((140, 112),)), ("Count from one to five, then stop.", ())),
    "text": (("Say something.", ()), ("Tell me which digits there are, and in which order.", ())),
}
"""Case -> samples: a question, and sizes of images (width, height)."""


_QUESTIONS = (
    "Describe the picture. What is in it, and where?",
    "Which digits do you see?",
    "Is it noise?",
    "What color?",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One batch, padded on the left."""

    name: str
    batch: dict[str, Tensor]


def cases(processor: Any) -> Iterator[Case]:
    """Yield all batches; pictures are noise of a fixed seed.

    Raises:
        SourceError: The processor cannot make them.
    """
    noise = np.random.default_rng(SEED)
    for name, samples in _SAMPLES.items():
        pictures = [(question, [_picture(noise, *size) for size in sizes]) for question, sizes in samples]
        try:
            yield Case(name, _batch(processor, pictures))
        except Exception as error:  # processors raise whatever they like
            raise SourceError(
                f"The processor cannot make the batch {name!r} that exports are checked with: {error}. Put the model's own "
                "processor files into the checkpoint."
            ) from error


def probe(processor: Any) -> dict[str, Tensor]:
    """Make one batch that is harder than users' pictures: structure of every size, edges, noise, and a single color.

    Raises the errors of the processor.
    """
    noise = np.random.default_rng(SEED)
    size = (168, 112)
    plain = Image.new("RGB", (84, 112), (250, 5, 120))
    pictures = [_scene(noise, *size), _scene(noise, *size[::-1]), _picture(noise, *size), plain]
    samples: list[tuple[str, list[Image.Image]]] = [
        (question, [each]) for question, each in zip(_QUESTIONS, pictures, strict=True)
    ]
    return _batch(processor, samples)


def _batch(processor: Any, samples: Sequence[tuple[str, Sequence[Image.Image]]]) -> dict[str, Tensor]:
    """Process samples (a question, and pictures before it), padded on the left."""
    processor = copy.copy(processor)
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    pictures = [list(images) for _, images in samples]
    made = processor(
        text=[question_text(processor, question, len(images)) for question, images in samples],
        **({"images": pictures} if any(pictures) else {}),
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    return {key: value for key, value in made.items() if isinstance(value, Tensor)}


def extended(batch: Mapping[str, Tensor], token: Tensor, family: Family) -> dict[str, Tensor]:
    """Append a token (batch, 1) to each row, which sees the images that the last one saw."""
    longer = dict(batch)
    longer["input_ids"] = torch.cat([batch["input_ids"], token], dim=1)
    longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
    for name, row in family.input_layout.items():
        if row == "token" and name in batch:
            longer[name] = torch.cat([batch[name], batch[name][:, -1:]], dim=1)
    return longer


def _picture(noise: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _scene(noise: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw squares of every size over one another, as strong as they are large: photographs have such a spectrum."""
    total = np.zeros((height, width, 3))
    for side in (1, 2, 4, 8, 16, 32, 64):
        squares = noise.integers(-128, 128, (-(-height // side), -(-width // side), 3))
        total += side**0.5 * np.kron(squares, np.ones((side, side, 1)))[:height, :width]
    return Image.fromarray(np.clip(128 + total / 4, 0, 255).astype(np.uint8))
