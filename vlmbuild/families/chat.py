"""Chats written by chat templates, which come from checkpoints and are not trusted: rendering within limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from torch import Tensor

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families.chat_sandbox import ChatEnvironment, rendering

_PROBE = "probe"


def render_chat(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
    **options: Any,
) -> str:
    """Write messages as `processor.apply_chat_template` does, within the limits of this module.

    Raises:
        UsageError: The processor has no chat template.
        BatchError: The template refuses the messages, exceeds a limit, or does what is not allowed.
    """
    template = chat_template(processor, bool(tools))
    if any(isinstance(message.get("content"), str) for message in messages) and not _writes_strings(template):
        messages = [_in_parts(message) for message in messages]
    values = {**processor.tokenizer.special_tokens_map, **options}
    with refusals():
        return compiled_template(template).render(
            _plain({**values, "messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt})
        )


class ChatTemplateError(BatchError, jinja2.TemplateError):
    """A chat template that refuses messages or exceeds a limit; Jinja's own error too, as transformers raises it."""


@contextmanager
def refusals() -> Iterator[None]:
    """Begin a rendering; raise ChatTemplateError for any failure of it."""
    rendering.begin()
    try:
        yield
    except Exception as error:  # templates fail in every way
        raise ChatTemplateError(
            f"The chat template refuses the messages: {str(error).rstrip('.') or type(error).__name__}. Use the model's "
            "published template, or other messages."
        ) from error


def chat_template(processor: Any, tools: bool = False) -> str:
    """Return the processor's template; of several by name, the default one, or the one for tools.

    Raises:
        UsageError: There is none.
    """
    template = getattr(processor, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("tool_use" if tools and "tool_use" in template else "default")
    if not isinstance(template, str) or not template:
        raise UsageError(
            "The processor has no chat template to write conversations in the model's format. Use the "
            "processor that vlmbuild.load returns, or set processor.chat_template to the model's published one."
        )
    return template


@lru_cache
def template_names(template: str) -> frozenset[str]:
    """List the names that a template reads from outside."""
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(ChatEnvironment().parse(template)))
    except jinja2.TemplateError as error:
        raise UsageError(f"The chat template is not valid Jinja: {error}. Use the model's published one.") from error


def question_text(processor: Any, question: str, images: int, videos: int = 0) -> str:
    """Write a question of the user after images and videos as a prompt; plain text without a chat template."""
    if not getattr(processor, "chat_template", None):  # a base model's
        return f"{processor.image_token}\n" * images + question
    media = ["image"] * images + ["video"] * videos
    content = [*({"type": kind} for kind in media), {"type": "text", "text": question}]
    return render_chat(processor, [{"role": "user", "content": content}], add_generation_prompt=True)


def question_batch(
    processor: Any, question: str, images: Sequence[Any] = (), videos: Sequence[str] = (), **options: Any
) -> dict[str, Tensor]:
    """Process images, videos and a question of the user as a prompt; see `question_text`.

    Args:
        processor: Processor of the model.
        question: Text after the images and videos.
        images: Images of the one message.
        videos: Paths of its video files.
        **options: For the processor.
    """
    if getattr(processor, "chat_template", None):  # it writes special tokens
        options = {"add_special_tokens": False, **options}
    media = ({"images": [list(images)]} if images else {}) | ({"videos": list(videos)} if videos else {})
    text = question_text(processor, question, len(images), len(videos))
    batch = processor(text=[text], **media, return_tensors="pt", **options)
    return {name: tensor for name, tensor in batch.items() if isinstance(tensor, Tensor)}


@lru_cache(maxsize=32)
def _writes_strings(template: str) -> bool:
    """Tell whether a template writes a content that is a string; some drop it, and write lists of parts alone."""
    try:
        with refusals():
            return _PROBE in compiled_template(template).render(
                {"messages": [{"role": "user", "content": _PROBE}], "add_generation_prompt": False}
            )
    except ChatTemplateError:  # it needs more than this, and sees the messages as they are
        return True


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


@lru_cache(maxsize=32)
def compiled_template(template: str) -> jinja2.Template:
    """Compile a template in the sandbox. Raises jinja2.TemplateError."""
    return ChatEnvironment().from_string(template)


def _plain(value: Any) -> Any:
    """Rebuild a value of plain JSON types: templates see whether media are there, and nothing of them."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return f"<{type(value).__name__}>"
