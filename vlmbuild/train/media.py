"""Images and videos of samples as a processor takes them: opened, at the size of their own limits, and their tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import SizeDict

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families import Family
from vlmbuild.families.images import ImageError, image_size, open_image, resized
from vlmbuild.families.videos import open_video
from vlmbuild.train.content import Media


@dataclass(frozen=True, slots=True)
class MediaReader:
    """Reads the media of samples for a processor.

    Attributes:
        family: Family of the processor.
        processor: Processor of the model.
    """

    family: Family
    processor: Any

    @property
    def placeholders(self) -> dict[str, int]:
        """ "image" and "video" -> token id, as far as the processor knows them."""
        ids = {kind: getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video")}
        return {kind: int(token) for kind, token in ids.items() if token is not None}

    def joined(self, ids: Tensor) -> Tensor:
        """Tell which tokens of a text become one with what the processor writes next to an image: bool (tokens,)."""
        placeholders, joined = (
            torch.isin(ids, torch.tensor(sorted(tokens), dtype=torch.int64))
            for tokens in (self.placeholders.values(), self.family.joined_tokens(self.processor))
        )
        pad = torch.nn.functional.pad
        return joined & (pad(placeholders[1:], (0, 1)) | pad(placeholders[:-1], (1, 0)))

    def open(self, media: Media, where: str) -> Any:
        """Open an image and resize it to limits of its own; of a video return the frames that are used, and their metadata."""
        if media.kind == "video":
            with named_errors(where, "the video"):
                return open_video(media.value, self.processor.video_processor, where, **media.limits)
        image = open_image(media.value, where)
        size = image_size(image, where)
        wanted = self._size(size, media, where)
        with named_errors(where, "the image"):
            self.family.image_tokens(self.processor, *wanted)  # refuses sizes that the processor refuses
        return image if wanted == size else resized(image, wanted, where)

    def _size(self, size: tuple[int, int], media: Media, where: str) -> tuple[int, int]:
        """Return height and width of an image after its own limits."""
        if not media.limits:
            return size
        with named_errors(where, "the image"):
            return self.family.limited_size(self.processor, *size, media.limits)

    def tokens(self, media: Media, where: str) -> int:
        """Count the tokens of an image or video."""
        if media.kind == "video":
            with named_errors(where, "the video"):
                video = as_they_are([self.open(media, where)])
                made = self.processor.video_processor(**video, return_metadata=True, return_tensors="pt")
                written = self.processor.replace_video_token(made, 0)
                return len(self.processor.tokenizer(written, add_special_tokens=False)["input_ids"])
        size = self._size(image_size(media.value, where), media, where)
        with named_errors(where, "the image"):
            return self.family.image_tokens(self.processor, *size)


def as_they_are(videos: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the arguments of a video processor for frames that are chosen already, with their metadata."""
    frames, metadata = map(list, zip(*videos, strict=True))
    return {"videos": frames, "video_metadata": metadata, "do_sample_frames": False}


@contextmanager
def named_errors(where: str, what: str) -> Iterator[None]:
    """Name the sample whose images a processor refuses."""
    try:
        yield
    except BatchError:
        raise
    except Exception as error:  # processors raise whatever they like
        said = str(error).rstrip(".")
        raise ImageError(
            f'{where}: {what} cannot be processed: {said}. Change it, or leave such samples out: unusable="drop".'
        ) from error


def with_size(processor: Any, size: Mapping[str, int], family: Family) -> Any:
    """Copy the processor with lower limits for images."""
    own = dict(processor.image_processor.size)
    for key, value in size.items():
        if key not in family.resizable_keys:
            known = ", ".join(family.resizable_keys) or f"none: {family.title} has images of one size"
            raise UsageError(f"size: {key!r} cannot be set. Pass one of these limits: {known}.")
        if not isinstance(value, int) or not 1 <= value <= own[key]:
            raise UsageError(f"size: {key} must be from 1 to {own[key]}, the limit of the processor; got {value!r}.")
    chosen = {**own, **size}
    if chosen.get("shortest_edge", 0) > chosen.get("longest_edge", 0) > 0:
        raise UsageError(
            f"size: shortest_edge {chosen['shortest_edge']} is above longest_edge {chosen['longest_edge']}."
        )
    limited = copy.copy(processor)
    limited.image_processor = copy.copy(processor.image_processor)
    limited.image_processor.size = SizeDict(**chosen)
    return limited
