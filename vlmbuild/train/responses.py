"""Where in a rendered conversation the model's own words stand: the characters that it must learn to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2

from vlmbuild.errors import BatchError
from vlmbuild.train.chat import Conversation


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the chat template writes it.

    Attributes:
        text: With one placeholder an image.
        spans: (start, end) characters of every response: what follows the generation prompt, up to and with the token that
            ends the turn. White space that the template writes after that token is not the model's to write.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render(conversation: Conversation, processor: Any, options: Mapping[str, Any], ends: tuple[str, ...]) -> Rendered:
    """The whole conversation, and its responses.

    Args:
        conversation: With or without responses.
        processor: Has the chat template.
        options: Further values for the template.
        ends: Texts of the tokens that may end a turn: all that were added to the vocabulary.

    Raises:
        BatchError: The template refuses the conversation, or writes a turn's prompt otherwise once its response follows:
            what would be trained is not what the model is asked later.
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
                    f"{conversation.where}: the chat template writes what comes before assistant message {turn} otherwise "
                    "when the answer follows than when it asks for one, so that training would differ from use. Often it "
                    "moves or drops the system message: put its text into the first user message. Or split the "
                    'conversation into samples with one answer each ("prompt" and "completion").'
                )
            spans.append((len(prompt), _end_of_turn(upto, len(prompt), ends)))
    return Rendered(whole, tuple(spans))


def _write(conversation: Conversation, turns: int, ask: bool, processor: Any, options: Mapping[str, Any]) -> str:
    """The first `turns` messages, and a generation prompt if `ask`."""
    try:
        text: str = processor.apply_chat_template(
            list(conversation.messages[:turns]), add_generation_prompt=ask, tokenize=False, **options
        )
    except (jinja2.TemplateError, ValueError, TypeError, IndexError, KeyError) as error:
        shown = "the whole conversation" if turns == len(conversation.messages) else f"its first {turns} messages"
        raise BatchError(
            f"{conversation.where}: the chat template refuses {shown}: {error} Roles must come in the order that the "
            "template knows."
        ) from error
    return text


def _end_of_turn(text: str, start: int, ends: tuple[str, ...]) -> int:
    """The end of the response at `start` in a text that ends with its turn."""
    stripped = text.rstrip()
    return len(stripped) if len(stripped) > start and stripped.endswith(ends) else len(text)
