"""Videos for tests: frames of photographs, and chats that show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from processors import photographs


def pan(count: int, size: tuple[int, int] = (112, 84)) -> list[Image.Image]:
    """Make frames of a camera that moves over a photograph."""
    photo = photographs()["coffee"]
    return [photo.crop((10 * n, 5 * n, 10 * n + 300, 5 * n + 220)).resize(size) for n in range(count)]


def text_of(setup: Any, *parts: str) -> str:
    """Render a chat of one message; "image" and "video" stand for themselves, other parts are text."""
    content = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]
    text: str = setup.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def write_mp4(path: Path, frames: list[Image.Image], fps: int) -> Path:
    """Write a video file; skips the test where PyAV is not installed."""
    av = pytest.importorskip("av", reason="writing and reading videos needs PyAV")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in [*(av.VideoFrame.from_image(image) for image in frames), None]:
            container.mux(stream.encode(frame))
    return path
