"""The content of chat messages: texts, and placeholders of images and videos."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmbuild.errors import BatchError
from vlmbuild.families.videos import SAMPLING

Part = dict[str, Any]

LIMITS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
"""Keys of an image's part that say how large it shall be."""
_OPTIONS = {"image": LIMITS, "video": SAMPLING}
_SOURCES = {"image": ("image", "path", "url", "base64"), "video": ("video", "path", "url")}
_TAGS = re.compile(r"(<image>|<video>)")


@dataclass(frozen=True, slots=True)
class Media:
    """An image or video of a sample.

    Attributes:
        kind: "image" or "video".
        value: A PIL image, an array, a path, an address, encoded bytes or a file; of a video a list of frames, or a path. None
            stands for the next one beside the messages.
        limits: Values of `LIMITS`; of a video of `SAMPLING`.
    """

    kind: str
    value: Any
    limits: Mapping[str, Any] = field(default_factory=dict)


def is_list(value: Any) -> bool:
    """Tell whether a value is a sequence, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def has_tags(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a text has `<image>` or `<video>`."""
    contents = (message["content"] for message in messages)
    texts = (
        text
        for content in contents
        for text in ([content] if isinstance(content, str) else (part.get("text", "") for part in content))
    )
    return any(_TAGS.search(text) for text in texts)


def read_content(content: Any, role: str, media: list[Media], where: str, *, tags: bool = False) -> str | list[Part]:
    """Read a text or parts, without empty keys; append the media of placeholders to `media`.

    Args:
        content: Text, or a list of parts.
        role: Role of the message, for error messages.
        media: Media of the sample.
        where: Name of the sample, for error messages.
        tags: Whether `<image>` and `<video>` in texts are placeholders.
    """
    if isinstance(content, str):
        return _split(content, media) if tags and _TAGS.search(content) else content
    if content is None or not is_list(content):
        raise BatchError(
            f"{where}: the content of the {role} message must be a string or a list of parts, not {type(content).__name__}."
        )
    parts = [_part(part, media, where) for part in content]
    return [one for part in parts for one in (_split(part["text"], media) if tags and "text" in part else [part])]


def _split(text: str, media: list[Media]) -> list[Part]:
    """Divide a text at its tags; they become placeholders."""
    parts: list[Part] = []
    for piece in filter(None, _TAGS.split(text)):
        kind = piece[1:-1] if _TAGS.fullmatch(piece) else ""
        if kind:
            media.append(Media(kind, None))
        parts.append({"type": kind} if kind else {"type": "text", "text": piece})
    return parts


def _part(part: Any, media: list[Media], where: str) -> Part:
    values = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = values.pop("type", None)
    if kind == "text" and isinstance(values.get("text"), str):
        _refuse_unread(values, ("text",), "text", where)
        return {"type": "text", "text": values["text"]}
    if kind == "image_url":
        url = values.pop("image_url", None)
        values |= {**url} if isinstance(url, Mapping) else {"url": url}
        kind = "image"
    if kind not in _SOURCES:
        raise BatchError(
            f'{where}: a content part must be {{"type": "text", "text": ...}}, {{"type": "image", "image": ...}}, '
            f'{{"type": "image_url", ...}} or {{"type": "video", "video": ...}}, not {str(part)[:80]!r}.'
        )
    if values.get("detail") == "auto":  # the processor's own sizes
        del values["detail"]
    _refuse_unread(values, (*_SOURCES[kind], *_OPTIONS[kind]), kind, where)
    sources = [values[key] for key in _SOURCES[kind] if key in values]
    if len(sources) > 1:
        raise BatchError(
            f"{where}: one {kind} part has {len(sources)} of {', '.join(_SOURCES[kind])}. Leave all but one out."
        )
    limits = {key: values[key] for key in _OPTIONS[kind] if key in values}
    media.append(Media(kind, sources[0] if sources else None, limits))
    return {"type": kind}


def _refuse_unread(values: Mapping[str, Any], read: Sequence[str], kind: str, where: str) -> None:
    if unread := sorted(key for key in values if key not in read):
        raise BatchError(
            f"{where}: the key {unread[0]!r} ({str(values[unread[0]])[:40]}) of a part of type {kind} has "
            f"no effect on this model. Leave it out; keys that are read: type, {', '.join(read)}."
        )


def with_media_first(
    messages: list[dict[str, Any]], columns: Mapping[str, Sequence[Any]], where: str
) -> tuple[list[dict[str, Any]], list[Media]]:
    """Put placeholders of the columns' media before the first user message, where TRL puts them too."""
    media = [Media(kind, None) for kind, values in columns.items() for _ in values]
    if not media:
        return messages, media
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise BatchError(
            f"{where} has {len(media)} images and videos beside its messages, but no user message to put them into. Add one, "
            "or placeholders."
        )
    content = messages[first]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    placed = {"role": "user", "content": [*({"type": one.kind} for one in media), *parts]}
    return [*messages[:first], placed, *messages[first + 1 :]], media
