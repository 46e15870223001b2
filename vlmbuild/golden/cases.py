"""Prompts and images of golden cases: the packaged ones, or the user's."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.families.chat import question_text, render_chat
from vlmbuild.families.images import ImageError, open_image

Message = Mapping[str, Any]

NUMERICS_PREFIX = "golden: "
"""Before a golden case's name in the manifest's `numerics`."""
PIXEL_VALUES = "pixel_values"
"""Key of the processors' pixels."""
_PACKAGED: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "one image": ("What is in the picture?", ((336, 224),)),
    "two images": ("Compare the two pictures.", ((300, 180), (140, 260))),
    "wide image": ("Describe it in one sentence.", ((700, 110),)),
    "text": ("Count from one to five, then stop.", ()),
}
"""Case -> a question, and sizes of images (width, height)."""
_EXAMPLE = (
    '{"messages": [{"role": "user", "content": [{"type": "image", "image": "FILE"}, {"type": "text", "text": "..."}]}]}'
)
_MOST = 64
"""Cases of a user's file: each is computed in float32."""


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """A prompt.

    Attributes:
        name: Name of the case.
        messages: The conversation; each image is {"type": "image"}.
        images: Its images, in order, as RGB.
        pixels: float32 pixels in place of the processor's `pixel_values`, of their shape but for axes of size one; None keeps
            them. They are not written into artifacts.
    """

    name: str
    messages: tuple[Message, ...]
    images: tuple[Image.Image, ...]
    pixels: npt.NDArray[np.float32] | None = None

    def text(self, processor: Any) -> str:
        """Write the prompt with the processor's chat template; of a processor without one, in plain text."""
        if getattr(processor, "chat_template", None):
            return render_chat(processor, self.messages, add_generation_prompt=True)
        parts = [part["text"] for message in self.messages for part in _parts(message) if part["type"] == "text"]
        return question_text(processor, " ".join(parts), len(self.images))

    def batch(self, processor: Any) -> dict[str, Tensor]:
        """Process the prompt. Raises SourceError when the processor cannot, and for pixels of another shape."""
        try:
            images = {"images": [list(self.images)]} if self.images else {}
            made = processor(text=[self.text(processor)], **images, add_special_tokens=False, return_tensors="pt")
        except Exception as error:  # processors raise whatever they like
            raise SourceError(
                f"The processor cannot make the golden case {self.name!r}: {error}. Put the model's own processor files into "
                "the checkpoint, or pass prompts of your own with --golden FILE.jsonl."
            ) from error
        batch = {key: value for key, value in made.items() if isinstance(value, Tensor)}
        if self.pixels is not None:
            own, given = batch[PIXEL_VALUES], torch.from_numpy(self.pixels)
            if own.squeeze().shape != given.squeeze().shape:
                raise SourceError(
                    f"The engine's pixels of the golden case {self.name!r} have the shape {list(given.shape)}, and the "
                    f"processor's have {list(own.shape)}. Give both the same processor files."
                )
            batch[PIXEL_VALUES] = given.reshape(own.shape)
        return batch


def packaged_cases() -> list[GoldenCase]:
    """Make the packaged cases."""
    cases = []
    for name, (question, sizes) in _PACKAGED.items():
        content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": question}]
        images = tuple(_picture(number, *size) for number, size in enumerate(sizes))
        cases.append(GoldenCase(name, ({"role": "user", "content": content},), images))
    return cases


def read_cases(file: Path) -> list[GoldenCase]:
    """Read a user's cases, one a line: {"messages": [...]}; images are paths, relative to the file. Answers at the end of a
    conversation are left out.

    Raises:
        UsageError: A line is no such object, or an image cannot be read.
    """
    cases = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} cannot be read as golden cases: {getattr(error, 'strerror', None) or error}. Pass a file with one "
            '{"messages": [...]} a line, or `packaged`.'
        ) from error
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        if line.strip():
            try:
                cases.append(_read_case(json.loads(line), f"line {number}", file.parent, where))
            except ImageError as error:
                raise UsageError(str(error)) from error
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                said = f"a message or a part of it has no {error}" if isinstance(error, KeyError) else str(error)
                raise UsageError(f"{where}: this is no golden case: {said}. Write {_EXAMPLE}.") from error
    if not 0 < len(cases) <= _MOST:
        raise UsageError(f"{file} has {len(cases)} cases. Pass 1 to {_MOST} with --golden.")
    return cases


def _read_case(value: Any, name: str, folder: Path, where: str) -> GoldenCase:
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        raise ValueError('there is no list "messages"')
    said = [dict(message) for message in value["messages"]]
    while said and said[-1]["role"] == "assistant":
        said.pop()
    if not said:
        raise ValueError("there is no message to answer")
    images: list[Image.Image] = []
    for message in said:
        content = []
        for part in _parts(message):
            if part["type"] == "image":
                given = str(part.get("path") or part.get("url") or part["image"])
                images.append(open_image(given if given.startswith("data:") else folder / given, where).convert("RGB"))
                part = {"type": "image"}
            content.append(part)
        message["content"] = content
    return GoldenCase(name, tuple(said), tuple(images))


def _parts(message: Message) -> Iterator[dict[str, Any]]:
    content = message["content"]
    yield from [{"type": "text", "text": content}] if isinstance(content, str) else map(dict, content)


def png(image: Image.Image) -> bytes:
    """Encode an image without loss."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=False, compress_level=9)
    return stream.getvalue()


def _picture(number: int, width: int, height: int) -> Image.Image:
    """Draw slopes, squares of every size and single pixels: filters, channels, rows and columns all show."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)]
    picture = np.stack(channels[number:] + channels[:number], axis=-1)
    for step in range(7):
        side = 2**step
        left, top = (37 * step + 11 * number) % max(1, width - side), (29 * step) % max(1, height - side)
        picture[top : top + side, left : left + side] = (255 - 36 * step, 36 * step, 200 * (step % 2))
    stripes = (y < height // 4) & (x > width // 2)
    picture[stripes & ((x // 2 + y // 3) % 2 == 0)] = 0
    return Image.fromarray(picture.astype(np.uint8))
