"""Chat samples about real photographs, in the forms that users have them."""

from __future__ import annotations

from typing import Any

from processors import photographs

Example = dict[str, Any]


def turn(role: str, *parts: Any) -> dict[str, Any]:
    """Make a message; parts that are no text are images in its content."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": role, "content": content}


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write contents as lists of parts: some chat templates drop a string."""
    return [
        {**m, "content": turn("", m["content"])["content"] if isinstance(m["content"], str) else m["content"]}
        for m in messages
    ]


def text_only(question: str = "Name three planets.", answer: str = "Mars, Venus and Earth.") -> Example:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def one_image(name: str = "chelsea", answer: str = "A cat.") -> Example:
    """Make a sample as Unsloth's users have it: the image in the content."""
    return {"messages": [turn("user", photographs()[name], "What is this?"), turn("assistant", answer)]}


def two_images(first: str = "coffee", second: str = "tall") -> Example:
    """Make a sample as TRL's users have it: images in a column of their own; two turns."""
    content = [
        {"type": "text", "text": "Compare"},
        {"type": "image"},
        {"type": "text", "text": "with"},
        {"type": "image"},
    ]
    messages = [
        {"role": "user", "content": content},
        turn("assistant", "One is a cup."),
        {"role": "user", "content": "And the other?"},
        turn("assistant", "The sky at night."),
    ]
    return {"messages": messages, "images": [photographs()[first], photographs()[second]]}


SAMPLES = [
    text_only(),
    one_image("chelsea"),
    two_images("coffee", "tall"),
    one_image("wide", "Stars, far away."),
    text_only("Write a haiku.", "No."),
    two_images("camera", "rocket"),
    one_image("retina", "An eye."),
]
"""Samples with no, one and two images."""
