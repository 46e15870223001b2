"""Video files of samples: decoded as transformers decodes them, with PyAV, within limits that are checked before a frame is.

transformers' own video processors decode with torchcodec alone; where that is installed, they keep it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from transformers.utils.import_utils import is_av_available, is_torchcodec_available
from transformers.video_utils import (
    VideoMetadata,
    default_sample_indices_fn,
    load_video,
    make_batched_metadata,
    make_batched_videos,
)

from vlmbuild.families.derived_class import derive
from vlmbuild.families.images import open_image
from vlmbuild.util.pixels import VARIABLE, max_pixels

SAMPLING = ("fps", "num_frames")
"""Keys of a video that say which of its frames are taken."""
_IMAGES = 10
"""The chosen frames of a video may have together as many pixels as this number of the largest images."""


def open_video(video: Any, processor: Any, where: str, **sampling: Any) -> tuple[Any, VideoMetadata]:
    """Read the frames of a video that a processor would take.

    Args:
        video: A list of frames, an array of them, the path of a file or its file:// address.
        processor: The video processor.
        where: Name of the sample, for messages about frames.
        sampling: Values of `SAMPLING`; without any, the processor's settings hold.

    Returns:
        The frames, and their metadata.

    Raises:
        ImageError: A frame cannot be read.
        ValueError: The file cannot be read, or has more pixels than allowed.
    """
    choose = partial(processor.sample_frames, **sampling) if sampling or processor.do_sample_frames else None
    if not isinstance(video, list | tuple) and not hasattr(video, "shape"):
        path = _path(video)
        frames, metadata = processor.fetch_videos(path, sample_indices_fn=_limited(path, choose))
        return _complete(path, frames, metadata), metadata
    opened = [open_image(frame, where) for frame in video] if isinstance(video, list | tuple) else video
    batched: Any = make_batched_videos([opened])
    unknown: Any = None
    ((frames,), (metadata,)) = batched, make_batched_metadata(batched, video_metadata=unknown)
    if choose is not None:
        metadata.frames_indices = choose(metadata=metadata)
        frames = frames[metadata.frames_indices]
    return frames, metadata


def list_videos(videos: Any) -> list[Any]:
    """List videos in whatever form processors take them: arrays (frames, height, width, 3), and paths of files as text."""
    if isinstance(videos, str | Path):
        return [str(videos)]
    if isinstance(videos, list | tuple) and any(map(_holds_path, videos)):
        return [video for entry in videos for video in list_videos(entry)]
    return list(make_batched_videos(videos))


def _holds_path(videos: Any) -> bool:
    return isinstance(videos, str | Path) or (isinstance(videos, list | tuple) and any(map(_holds_path, videos)))


def read_video(source: Any, sample_indices_fn: Callable[..., Any] | None = None) -> tuple[Any, Any]:
    """Decode a video file with PyAV, or several; has the form of transformers' `fetch_videos`.

    Args:
        source: Path or file:// address, or a list of them.
        sample_indices_fn: Function from metadata to the numbers of the frames to take; None takes all.

    Returns:
        Frames (frames, height, width, 3) and metadata, or a list of each.

    Raises:
        ValueError: The file cannot be read, or has more pixels than allowed.
    """
    if isinstance(source, list | tuple):
        frames, metadata = zip(*(read_video(one, sample_indices_fn) for one in source), strict=True)
        return list(frames), list(metadata)
    path: Any = _path(source)
    if not is_av_available():
        raise ValueError(
            f"Decoding {path} needs PyAV, which is not installed. Install it (pip install av), or pass the video as a list of "
            "its frames"
        )
    try:
        frames, facts = load_video(path, backend="pyav", sample_indices_fn=_limited(path, sample_indices_fn))
    except _RefusedError:
        raise
    except Exception as error:  # FFmpeg's errors, and those of a file without frames
        reason = "it has no video" if isinstance(error, IndexError) else error
        raise ValueError(f"{path} cannot be decoded: {reason}. Pass a video file that PyAV opens") from error
    return _complete(path, frames, facts), facts


def with_files(video_processor: Any) -> Any:
    """Make transformers' video processor decode files by `read_video`; its class keeps its name. Returns the processor."""
    if not is_torchcodec_available():
        base: Any = type(video_processor)
        video_processor.__class__ = _with_files(base)
    return video_processor


@lru_cache
def _with_files(base: type) -> type:
    """Derive the class from a video processor's."""
    return derive(
        base,
        {"fetch_videos": lambda _, videos, sample_indices_fn=None: read_video(videos, sample_indices_fn)},
        _with_files,
    )


class _RefusedError(ValueError):
    """A video file that can be decoded, but not as asked, or is over a limit."""


def _path(source: Any) -> str:
    """Return the absolute path of a video file; FFmpeg would open other forms as addresses."""
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"A video is {type(source).__name__}. Pass a list of its frames, or the path of a file; write bytes to a file"
        )
    text = os.fspath(source)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    elif "://" in text:
        raise ValueError(f"The video {text[:200]} is an address, and videos are not downloaded. Download it to a file")
    if not Path(text).is_file():
        raise ValueError(f"The video {text[:200]} cannot be read: there is no such file. Pass the path of a video file")
    return str(Path(text).absolute())


def _limited(path: str, choose: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a function that chooses frames, and raises ValueError for a file over the limits before it is decoded."""

    def chosen(metadata: VideoMetadata, **options: Any) -> Any:
        if metadata.total_num_frames < 1:
            raise _RefusedError(
                f"{path} does not say how many frames it has. Convert it: ffmpeg -i {path} converted.mp4"
            )
        try:
            indices = np.asarray((choose or default_sample_indices_fn)(metadata=metadata, **options))
        except ValueError as error:  # of its arguments, or for a video of this length
            raise _RefusedError(f"{path}: {error}") from error
        size, most = (metadata.width or 0) * (metadata.height or 0), max_pixels()
        if size > most or size * len(indices) > _IMAGES * most:
            raise _RefusedError(
                f"{path}: {len(indices)} frames of {metadata.width} x {metadata.height} pixels are more than {most:,} pixels "
                f"a frame or {_IMAGES * most:,} a video. Take fewer frames ({', '.join(SAMPLING)}), make them smaller, or set "
                f"the environment variable {VARIABLE}"
            )
        return indices

    return chosen


def _complete(path: str, frames: Any, metadata: Any) -> Any:
    """Return the frames. Raises ValueError if the file has fewer than it says."""
    if len(frames) != len(metadata.frames_indices):
        raise _RefusedError(
            f"{path} has only {len(frames)} of {len(metadata.frames_indices)} frames: it is cut or damaged. Convert it: "
            f"ffmpeg -i {path} converted.mp4"
        )
    return frames
