"""The command `vlmbuild run`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vlmbuild.artifact.hub import artifact_directory
from vlmbuild.artifact.reader import ArtifactReader, check_id
from vlmbuild.cli.options import check_image, device_option, id_option, json_option, revision_option, trust_option
from vlmbuild.cli.output import StageProgress, print_json
from vlmbuild.errors import BatchError, UsageError


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text of the user's turn.")
@click.option("--image", "images", multiple=True, metavar="FILE", help="Image before the prompt. Repeatable.")
@click.option(
    "--video", "videos", multiple=True, metavar="FILE", help="Video before the prompt (Qwen families). Repeatable."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Stop after this many tokens."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, max=100),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 means greedy decoding.",
)
@device_option
@id_option
@revision_option
@trust_option
@json_option
def command(
    artifact: Path,
    prompt: str,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    device: str | None,
    expected_id: str | None,
    revision: str | None,
    trust_code: bool,
    as_json: bool,
) -> None:
    """Generate an answer to a prompt with images and videos.

    ARTIFACT is a folder, or the hub id of an artifact, which is downloaded into the hub's cache.

    Prints the answer while it is generated. With --json, prints the complete answer with token counts and seconds.

    \b
    Examples:
        vlmbuild run qwen2-vl-nf4 --image photo.jpg --prompt "What is this?"
        vlmbuild run qwen2-vl-nf4 --image a.jpg --image b.jpg --prompt "Compare."
        vlmbuild run qwen2-vl-nf4 --video clip.mp4 --prompt "What happens?"
        vlmbuild run qwen2-vl-nf4 --prompt "Write a haiku." --temperature 0.7
        vlmbuild run owner/qwen2-vl-nf4 --revision v1 --prompt "Write a haiku."
    """
    if not prompt.strip():
        raise UsageError('The prompt is empty. Pass a question, such as --prompt "What is in the picture?".')
    check_id(expected_id)
    for image in images:
        check_image(image, "the path of an image")
    for video in videos:
        if not Path(video).is_file():
            raise UsageError(f"--video {video}: there is no such file. Pass the path of a video.")
    with StageProgress(lines=False) as progress:
        directory = artifact_directory(artifact, revision, progress)
        # Refuse a folder that is no artifact, or another one, before torch is imported.
        reader = ArtifactReader(directory, verify=False, expected_id=expected_id)

        from transformers import TextStreamer

        from vlmbuild.runtime.load import best_device, load

        pictures = [_opened(image) for image in images]
        model, processor = load(
            directory,
            expected_id=expected_id,
            device=device or best_device(reader.manifest.target),
            trust=("code",) if trust_code else (),
        )
        batch = _batch(processor, prompt, pictures, videos)
    tokenizer, prompt_tokens = processor.tokenizer, batch["input_ids"].shape[1]
    started = time.perf_counter()
    tokens = model.generate(
        **{name: tensor.to(model.device) for name, tensor in batch.items()},
        **_generation(model.generation_config, tokenizer, temperature),
        max_new_tokens=max_new_tokens,
        streamer=None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )[0, prompt_tokens:]
    if as_json:
        print_json(
            {
                "text": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                "prompt_tokens": prompt_tokens,
                "new_tokens": len(tokens),
                "seconds": time.perf_counter() - started,
            }
        )


def _opened(image: str) -> Any:
    from vlmbuild.families.images import ImageError, open_image

    try:
        return open_image(image, "--image")
    except ImageError as error:
        raise UsageError(str(error)) from error


def _batch(processor: Any, prompt: str, images: Sequence[Any], videos: Sequence[str] = ()) -> dict[str, Any]:
    """Format a user's turn with images and videos."""
    if not getattr(processor, "chat_template", None):
        raise UsageError(
            "The artifact's processor has no chat template to format the prompt with. Build from a checkpoint that was "
            "tuned on conversations."
        )
    if videos and getattr(processor, "video_token", None) is None:
        raise UsageError("--video: the artifact's processor reads no videos. Pass their frames, each with --image.")
    from vlmbuild.families.chat import question_batch

    try:
        return question_batch(processor, prompt, images, videos)
    except BatchError:
        raise
    except ValueError as error:
        kind = "video" if videos else "image"
        raise UsageError(
            f"--{kind}: the artifact's processor refuses the {kind}s: {error}. Pass other {kind}s, or leave --{kind} out."
        ) from error


def _generation(config: Any, tokenizer: Any, temperature: float) -> dict[str, Any]:
    """Return sampling options, and the end tokens of generation_config.json, or of the tokenizer if there are none."""
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    if not temperature:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    padding = first_end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"eos_token_id": ends, "pad_token_id": padding, **sampling}
