"""Chat samples in the forms that users write, read into one: plain messages, and the images of their placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmbuild.errors import BatchError

Message = dict[str, Any]

_SHOWN = 40
"""Characters of a sample's text in messages about it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One sample.

    Attributes:
        where: Its name in error messages: its number and the beginning of its first user message.
        messages: Role and content; content is a string, or parts: text or a placeholder of an image.
        images: PIL images, arrays or paths, in the order of the placeholders.
        first_response: Index of the first message whose assistant turns are responses; earlier ones belong to the prompt.
    """

    where: str
    messages: tuple[Message, ...]
    images: tuple[Any, ...]
    first_response: int = 0


def read_conversation(example: Any, number: int) -> Conversation:
    """Read a sample of a chat data set.

    Args:
        example: Has "messages", or "prompt" and "completion" (lists of messages; only the completion is a response), each
            message with "role" and "content". Images are in the content ({"type": "image", "image": ...}; "path" and "url"
            are taken too), or in a column "images" (a list) or "image" (one) in the order of the placeholders
            {"type": "image"}. Without any placeholder they go before the first user's message. Keys that are None, as in
            tables, count as missing.
        number: Number of the sample in its batch, for error messages.

    Raises:
        BatchError: The form is another one, or there are more or fewer images than placeholders.
    """
    where = f"Sample {number}"
    prompt, completion = _turns(example, where)
    pictures: list[Any] = []
    messages = [_message(message, pictures, where) for message in (*prompt, *completion)]
    where += _quoted(messages)
    column = _column(example)
    if column and not pictures:
        messages = _with_placeholders(messages, len(column), where)
    images = _match(pictures, column, where)
    return Conversation(where, tuple(messages), tuple(images), len(prompt))


def _turns(example: Any, where: str) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return messages of the prompt, in which no turn is a response, and the others."""
    sample = example if isinstance(example, Mapping) else {}
    whole = sample.get("messages")
    prompt, completion = ((), whole) if whole is not None else (sample.get("prompt"), sample.get("completion"))
    if prompt is None or completion is None or not (_is_list(prompt) and _is_list(completion) and completion):
        keys = ", ".join(map(str, sample)) or type(example).__name__
        raise BatchError(
            f'{where} has no "messages" (or "prompt" and "completion"): a list of {{"role": ..., "content": ...}}; it has: '
            f"{keys}. transformers.Trainer removes columns unless remove_unused_columns=False."
        )
    return prompt, completion


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _message(message: Any, pictures: list[Any], where: str) -> Message:
    """Copy a message without empty keys; append the images of its placeholders, or None, to `pictures`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BatchError(f'{where}: a message must be {{"role": ..., "content": ...}}, not {str(message)[:80]!r}.')
    if dropped := sorted(key for key, value in message.items() if value and key not in ("role", "content")):
        raise BatchError(
            f"{where}: the {message['role']} message has {dropped[0]!r}, which would be lost. Write it into the content if "
            "the model shall see it."
        )
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if content is None or not _is_list(content):
        raise BatchError(
            f"{where}: the content of the {message['role']} message must be a string or a list of parts, not "
            f"{type(content).__name__}."
        )
    return {"role": message["role"], "content": [_part(part, pictures, where) for part in content]}


def _part(part: Any, pictures: list[Any], where: str) -> dict[str, Any]:
    values = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if values.get("type") == "text" and isinstance(values.get("text"), str):
        return {"type": "text", "text": values["text"]}
    if values.get("type") == "image":
        pictures.append(next((values[key] for key in ("image", "path", "url") if key in values), None))
        return {"type": "image"}
    raise BatchError(
        f'{where}: a content part must be {{"type": "text", "text": ...}} or {{"type": "image", "image": ...}}, not '
        f"{str(part)[:80]!r}."
    )


def _column(example: Mapping[str, Any]) -> list[Any]:
    """Return the images beside the messages."""
    images, image = example.get("images"), example.get("image")
    if images is None:
        return [] if image is None else [image]
    return list(images) if isinstance(images, list | tuple) else [images]


def _with_placeholders(messages: list[Message], count: int, where: str) -> list[Message]:
    """Put placeholders before the first user message, where TRL puts them too."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise BatchError(f"{where} has {count} images but no user message to put them into. Add one, or placeholders.")
    content = messages[first]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    placed = {"role": "user", "content": [*({"type": "image"} for _ in range(count)), *parts]}
    return [*messages[:first], placed, *messages[first + 1 :]]


def _match(pictures: list[Any], column: list[Any], where: str) -> list[Any]:
    """Return the images of all placeholders: their own, and the column's for the others, in order."""
    if not pictures:
        return column
    empty = sum(picture is None for picture in pictures)
    if empty != len(column):
        raise BatchError(
            f"{where} has {empty} image placeholders without an image of their own, and {len(column)} images beside its "
            'messages. Give every {"type": "image"} its image, in the part itself or, in order, in the column "images".'
        )
    left = iter(column)
    return [next(left) if picture is None else picture for picture in pictures]


def _quoted(messages: Sequence[Message]) -> str:
    """Return the beginning of the first user's text, in brackets."""
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            text = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
            text = " ".join(text.split())
            return f' ("{text[:_SHOWN]}{"…" if len(text) > _SHOWN else ""}")' if text else ""
    return ""
