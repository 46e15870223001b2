"""Chat samples in the forms that users write, read into one: plain messages, and the media of their placeholders."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmbuild.errors import BatchError
from vlmbuild.train.content import Media, Part, has_tags, is_list, read_content, with_media_first

Message = dict[str, Any]

COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "image", "images", "video", "videos"),
    *("system", "tools", "chat_template_kwargs"),
)
"""Columns of a sample that are read."""
_SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Names in "from" -> roles; others are roles already."""
_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_FLAGS = ("weight", "train", "loss")
"""Keys of a message that say whether it is learned, 0 or 1."""
_SHOWN = 40
"""Characters of a sample's text in messages about it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One sample.

    Attributes:
        where: Its name in error messages: its number and the beginning of its first user message.
        messages: Role and content; content is a string, or parts: text or a placeholder of an image or video.
        media: Images and videos, in the order of the placeholders.
        learned: Whether each message is a response whose text is learned.
        tools: Tools for the chat template.
        options: Further values for the chat template.
    """

    where: str
    messages: tuple[Message, ...]
    media: tuple[Media, ...]
    learned: tuple[bool, ...]
    tools: tuple[Any, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def values(self, kind: str) -> list[Media]:
        """List the media of a kind."""
        return [media for media in self.media if media.kind == kind]


def read_conversation(example: Any, number: int, *, ignore: Collection[str] = (), tags: bool = True) -> Conversation:
    """Read a sample of a chat data set.

    Args:
        example: A list of messages, or a mapping with "messages", "conversations", or "prompt" and "completion" (only the
            completion is learned). A message has "role" and "content", or "from" ("human", "gpt") and "value"; "weight",
            "train" or "loss" of 0 keeps an assistant's message from being learned. Media are in the content
            ({"type": "image", "image": ...}, {"type": "image_url", ...}, {"type": "video", ...}) or in columns "images" and
            "videos" (or "image" and "video" for one), in the order of their placeholders: {"type": "image"}, or `<image>` and
            `<video>` in the text. Without any placeholder they go before the first user's message. "system" becomes the first
            message; "tools" and "chat_template_kwargs" go to the template. What is None, as in tables, counts as missing.
        number: Number of the sample in its batch, for error messages.
        ignore: Columns to leave out.
        tags: Whether `<image>` and `<video>` in texts are placeholders.

    Raises:
        BatchError: A column, a key or a value is not understood, or they contradict each other.
    """
    where = f"Sample {number}"
    sample = {"messages": example} if is_list(example) else example if isinstance(example, Mapping) else {}
    sample = {key: value for key, value in sample.items() if value is not None and key not in ignore}
    prompt, completion = _turns(sample, example, where)
    given = [_system(sample, prompt or completion, where), *prompt] if sample.get("system") else prompt
    if unknown := [str(key) for key in sample if key not in COLUMNS]:
        raise BatchError(
            f"{where} has a column {unknown[0]!r}, which would be lost. Remove it, or pass ignore_columns={unknown} to the "
            f"collator. Columns that are read: {', '.join(COLUMNS)}."
        )
    messages: list[Message] = []
    flags: list[tuple[str, bool | None]] = []
    media: list[Media] = []
    for message in (*given, *completion):
        role, content, flag = _message(message, where)
        parts = read_content(content, role, media, where)
        messages.append({"role": role, "content": parts})
        flags.append(flag)
    where += _quoted(messages)
    columns = {kind: _column(sample, kind, where) for kind in ("image", "video")}
    messages, media = _placed(messages, media, columns, tags, where)
    learned = tuple(_learned(flag, turn >= len(given), where) for turn, flag in enumerate(flags))
    return Conversation(where, tuple(messages), tuple(media), learned, _tools(sample, where), _options(sample, where))


def _turns(sample: Mapping[str, Any], example: Any, where: str) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return messages of the prompt, in which no turn is a response, and the others."""
    forms = [
        form for form in (("messages",), ("conversations",), ("prompt", "completion")) if any(k in sample for k in form)
    ]
    if len(forms) > 1:
        raise BatchError(
            f"{where} has {' and '.join(form[0] for form in forms)}: two conversations. Leave one of them out."
        )
    turns = [sample.get(key) for key in forms[0]] if forms else [None]
    prompt, completion = ((), turns[0]) if len(turns) == 1 else turns
    if not (is_list(prompt) and is_list(completion) and completion):
        keys = ", ".join(map(str, sample)) or type(example).__name__
        raise BatchError(
            f'{where} has no "messages" (or "prompt" and "completion"): a list of {{"role": ..., "content": ...}}; it has: '
            f"{keys}. transformers.Trainer removes columns unless remove_unused_columns=False."
        )
    return prompt, completion  # type: ignore[return-value]  # lists


def _system(sample: Mapping[str, Any], messages: Sequence[Any], where: str) -> Message:
    """Return the message of the column "system"."""
    first = messages[0] if isinstance(messages[0], Mapping) else {}
    if not isinstance(sample["system"], str) or "system" in (first.get("role"), first.get("from")):
        raise BatchError(
            f'{where}: the column "system" must be a text, and then no message may have the role system. Leave one out.'
        )
    return {"role": "system", "content": sample["system"]}


def _message(message: Any, where: str) -> tuple[str, Any, tuple[str, bool | None]]:
    """Return role and content of a message, and (role, whether it says that it is learned)."""
    values = {key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping) else {}
    keys = ("from", "value") if "from" in values else ("role", "content")
    speaker = values.get(keys[0])
    if not isinstance(speaker, str):
        raise BatchError(f'{where}: a message must be {{"role": ..., "content": ...}}, not {str(message)[:80]!r}.')
    role = _SPEAKERS.get(speaker, speaker) if keys[0] == "from" else speaker
    if role not in _ROLES:  # templates write any name, and what a misspelt assistant says would not be learned
        known = (*_SPEAKERS, *_ROLES) if keys[0] == "from" else _ROLES
        raise BatchError(f"{where}: a message is from {speaker!r}. Use one of {', '.join(known)}.")
    unread = {key: value for key, value in values.items() if key not in (*keys, *_FLAGS)}
    if dropped := sorted(
        key for key, value in unread.items() if not (is_list(value) or isinstance(value, str | Mapping)) or value
    ):
        raise BatchError(
            f"{where}: the {role} message has {dropped[0]!r}, which would be lost. Write it into the content if "
            "the model shall see it."
        )
    return role, values.get(keys[1]), (role, _flag(values, role, where))


def _flag(values: Mapping[str, Any], role: str, where: str) -> bool | None:
    """Read whether a message says that it is learned; None if it says nothing."""
    flags = {key: values[key] for key in _FLAGS if key in values}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BatchError(f"{where}: the {role} message has {key} {value!r}. Pass 0 (not learned) or 1.")
    if len(set(flags.values())) > 1:
        raise BatchError(
            f"{where}: the {role} message has {flags}, which contradict each other. Leave all but one out."
        )
    return None if not flags else bool(next(iter(flags.values())))


def _learned(flag: tuple[str, bool | None], completion: bool, where: str) -> bool:
    """Tell whether a message is learned. Raises BatchError for one that shall be, but cannot."""
    role, said = flag
    possible = role == "assistant" and completion
    if said and not possible:
        part = "of the prompt" if role == "assistant" else f"of the role {role}"
        raise BatchError(
            f"{where}: a message {part} has a weight of 1, but is never learned. Set it to 0, or leave it out."
        )
    return possible and said is not False


def _column(sample: Mapping[str, Any], kind: str, where: str) -> list[Any]:
    """Return the images or videos beside the messages."""
    several, one = sample.get(f"{kind}s"), sample.get(kind)
    if several is not None and one is not None:
        raise BatchError(f'{where} has the columns "{kind}s" and "{kind}". Leave one of them out.')
    if several is None:
        return [] if one is None else [one]
    return list(several) if isinstance(several, list | tuple) else [several]


def _placed(
    messages: list[Message], media: list[Media], columns: Mapping[str, list[Any]], tags: bool, where: str
) -> tuple[list[Message], list[Media]]:
    """Give every placeholder its image or video: its own, or the column's next."""
    tagged = tags and has_tags(messages)
    if tagged and media:
        raise BatchError(
            f"{where} has <image> or <video> in a text, and media in parts of its content. Use one of the two, or pass "
            "tags=False to the collator if the text means these words."
        )
    if tagged:
        media = []
        for message in messages:
            message["content"] = read_content(message["content"], message["role"], media, where, tags=True)
    elif not media:
        messages, media = with_media_first(messages, columns, where)
    left = {kind: iter(values) for kind, values in columns.items()}
    for kind, values in columns.items():
        empty = sum(one.kind == kind and one.value is None for one in media)
        if empty != len(values):
            raise BatchError(
                f"{where} has {empty} {kind} placeholders without {'an' if kind == 'image' else 'a'} {kind} of their own, and "
                f'{len(values)} {kind}s beside its messages. Give every {{"type": "{kind}"}} or <{kind}> its {kind}, in the '
                f'part itself or, in order, in the column "{kind}s"; pass tags=False if a text means the word <{kind}>.'
            )
    return messages, [
        one if one.value is not None else Media(one.kind, next(left[one.kind]), one.limits) for one in media
    ]


def _tools(sample: Mapping[str, Any], where: str) -> tuple[Any, ...] | None:
    tools = sample.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except ValueError:
        tools = [None]
    if not tools:
        return None
    if not is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BatchError(
            f'{where}: the column "tools" must be a list of tools, each {{"type": "function", ...}}, or such as JSON.'
        )
    return tuple(tools)


def _options(sample: Mapping[str, Any], where: str) -> dict[str, Any]:
    options = sample.get("chat_template_kwargs", {})
    if not isinstance(options, Mapping):
        raise BatchError(f'{where}: the column "chat_template_kwargs" must be a mapping, not {type(options).__name__}.')
    return {str(key): value for key, value in options.items() if value is not None}


def _quoted(messages: Sequence[Message]) -> str:
    """Return the beginning of the first user's text, in brackets."""
    for message in messages:
        if message["role"] == "user":
            content: str | list[Part] = message["content"]
            text = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
            text = " ".join(text.split())
            return f' ("{text[:_SHOWN]}{"…" if len(text) > _SHOWN else ""}")' if text else ""
    return ""


def is_pack(example: Any) -> bool:
    """Tell a list of samples from a list of messages, which is one sample."""
    if not isinstance(example, list):
        return False
    messages = all(isinstance(entry, Mapping) and ("role" in entry or "from" in entry) for entry in example)
    return not example or not messages
