"""The responses in a rendered conversation: the characters that the model learns to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2

from vlmbuild.errors import BatchError
from vlmbuild.train.conversation import Conversation


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation written by the chat template.

    Attributes:
        text: The whole text, with one placeholder per image.
        spans: (start, end) characters of every response: from the end of the generation prompt to the end of the token that
            ends the turn. White space that the template writes after that token is excluded.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render(conversation: Conversation, processor: Any, options: Mapping[str, Any], ends: tuple[str, ...]) -> Rendered:
    """Render a whole conversation, and find its responses.

    Args:
        conversation: Conversation with or without responses.
        processor: Processor with the chat template.
        options: Further values for the template.
        ends: Texts of the tokens that may end a turn: all tokens added to the vocabulary.

    Raises:
        BatchError: The template refuses the conversation, or writes a turn's prompt differently once its response follows, so
            that training would differ from use.
    """
    messages = conversation.messages
    whole = _write(conversation, len(messages), False, processor, options)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn >= conversation.first_response:
            prompt = _write(conversation, turn, True, processor, options)
            upto = whole if turn + 1 == len(messages) else _write(conversation, turn + 1, False, processor, options)
            if not upto.startswith(prompt) or not whole.startswith(upto):
                raise BatchError(
                    f"{conversation.where}: the chat template writes the text before assistant message {turn} differently "
                    "with and without the answer, so that training would differ from use. Put the system message into the "
                    "first user message, which templates often move or drop, or split the conversation into samples with one "
                    'answer each ("prompt" and "completion").'
                )
            spans.append((len(prompt), _end_of_turn(upto, len(prompt), ends)))
    return Rendered(whole, tuple(spans))


def _write(conversation: Conversation, turns: int, prompt: bool, processor: Any, options: Mapping[str, Any]) -> str:
    """Return the text of the first `turns` messages, with a generation prompt if `prompt`."""
    try:
        text: str = processor.apply_chat_template(
            list(conversation.messages[:turns]), add_generation_prompt=prompt, tokenize=False, **options
        )
    except (jinja2.TemplateError, ValueError, TypeError, IndexError, KeyError) as error:
        shown = "the whole conversation" if turns == len(conversation.messages) else f"its first {turns} messages"
        raise BatchError(
            f"{conversation.where}: the chat template refuses {shown}: {error} Use the roles in the order that the "
            "template expects."
        ) from error
    return text


def _end_of_turn(text: str, start: int, ends: tuple[str, ...]) -> int:
    """Return the end of the response at `start` in a text that ends with its turn."""
    stripped = text.rstrip()
    return len(stripped) if len(stripped) > start and stripped.endswith(ends) else len(text)
