"""The responses in a rendered conversation: the characters that the model learns to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families.chat import chat_template, render_chat, template_names
from vlmbuild.train.conversation import Conversation


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation written by the chat template.

    Attributes:
        text: The whole text, with one placeholder per image or video.
        responses: (start, end) characters of the responses that are learned: from the end of the generation prompt to the end
            of the token that ends the turn. White space that the template writes after that token is excluded.
        others: Those of the assistant's other messages, if asked for.
    """

    text: str
    responses: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, int], ...]


def render(
    conversation: Conversation,
    processor: Any,
    options: Mapping[str, Any],
    ends: tuple[str, ...],
    *,
    others: bool = False,
) -> Rendered:
    """Render a whole conversation, and find its responses.

    Args:
        conversation: Conversation with or without responses.
        processor: Processor with the chat template.
        options: Further values for the template; the conversation's own have precedence.
        ends: Texts of the tokens that may end a turn: all tokens added to the vocabulary.
        others: Whether to find messages of the assistant that are not learned.

    Raises:
        BatchError: The template refuses or drops a part of the conversation, or writes a turn's prompt differently once its
            response follows, so that training would differ from use.
    """
    messages = conversation.messages
    options = {**options, **conversation.options}
    _check_options(conversation, processor)
    whole = _write(conversation, len(messages), False, processor, options)
    _check_nothing_is_lost(conversation, whole, processor, options)
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for turn, (message, learned) in enumerate(zip(messages, conversation.learned, strict=True)):
        if learned or (others and message["role"] == "assistant"):
            prompt = _write(conversation, turn, True, processor, options)
            upto = whole if turn + 1 == len(messages) else _write(conversation, turn + 1, False, processor, options)
            if not upto.startswith(prompt) or not whole.startswith(upto):
                raise BatchError(
                    f"{conversation.where}: the chat template writes the text before assistant message {turn} differently "
                    "with and without the answer, so that training would differ from use. Put the system message into the "
                    "first user message, which templates often move or drop, or split the conversation into samples with one "
                    'answer each ("prompt" and "completion").'
                )
            spans[learned].append((len(prompt), _end_of_turn(upto, len(prompt), ends)))
    return Rendered(whole, tuple(spans[True]), tuple(spans[False]))


def _check_options(conversation: Conversation, processor: Any) -> None:
    unread = sorted(set(conversation.options) - template_names(chat_template(processor, bool(conversation.tools))))
    if unread:
        raise BatchError(
            f"{conversation.where}: the chat template does not read {unread[0]!r} of chat_template_kwargs. Leave it out."
        )


def _check_nothing_is_lost(conversation: Conversation, whole: str, processor: Any, options: Mapping[str, Any]) -> None:
    for message in conversation.messages:
        if message["role"] == "assistant":
            continue  # templates may drop reasoning of earlier turns; what is learned is found in the text
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
        if lost := next((text for text in texts if text.strip() not in whole), None):
            raise BatchError(
                f"{conversation.where}: the chat template does not write the {message['role']} message "
                f"{lost.strip()[:60]!r} as it is. Write it into the first user message, or use a template that writes it."
            )
    if conversation.tools and whole == _write(
        conversation, len(conversation.messages), False, processor, options, False
    ):
        raise BatchError(
            f"{conversation.where} has tools, but the chat template does not write them. Use a template that does, or leave "
            'the column out: ignore_columns=["tools"].'
        )


def _write(
    conversation: Conversation,
    turns: int,
    prompt: bool,
    processor: Any,
    options: Mapping[str, Any],
    tools: bool = True,
) -> str:
    """Return the text of the first `turns` messages, with a generation prompt if `prompt`."""
    try:
        return render_chat(
            processor,
            conversation.messages[:turns],
            add_generation_prompt=prompt,
            tools=conversation.tools if tools else None,
            **options,
        )
    except BatchError as error:
        shown = "the whole conversation" if turns == len(conversation.messages) else f"its first {turns} messages"
        raise BatchError(
            f"{conversation.where}: {shown}: {str(error).rstrip('.')}. Use the roles in the order that the "
            "template expects."
        ) from error


def _end_of_turn(text: str, start: int, ends: tuple[str, ...]) -> int:
    """Return the end of the response at `start` in a text that ends with its turn."""
    stripped = text.rstrip()
    return len(stripped) if len(stripped) > start and stripped.endswith(ends) else len(text)


def check_processor(processor: Any, options: Mapping[str, Any]) -> None:
    """Raise UsageError for template options that nothing reads, and for a tokenizer that cannot pad."""
    if unread := sorted(set(options) - template_names(chat_template(processor))):
        raise UsageError(f"template_options: the chat template does not read {unread[0]!r}. Leave it out.")
    if processor.tokenizer.pad_token_id is None:
        raise UsageError(
            "The processor's tokenizer has no padding token. Set one that no text has, for example "
            "processor.tokenizer.pad_token = processor.tokenizer.eos_token; padding is never a label."
        )
