"""A tokenizer or chat template that the user has changed, saved with a merged model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmbuild.artifact.paths import GENERATION_CONFIG
from vlmbuild.errors import UsageError
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.runtime.torch.save import write_checkpoint

_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@contextmanager
def with_tokenizer(model: VisionLanguageModel, artifact: Path, processor: Any) -> Iterator[Path]:
    """Make a directory of an artifact's files (links) with another tokenizer and chat template; removed afterwards.

    The weights of a resized model are written there, since the artifact's have other rows.

    Args:
        model: Model of the artifact.
        artifact: Its directory; yielded as it is where nothing differs.
        processor: Processor or tokenizer; None is the artifact's.

    Raises:
        UsageError: A token has no embedding, or images would be processed in another way than the artifact's processor does.
    """
    stored = model.family.processor(artifact)
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None)
    changed = processor is not None and (
        tokenizer.get_vocab() != stored.tokenizer.get_vocab()
        or tokenizer.special_tokens_map != stored.tokenizer.special_tokens_map
        or template not in (None, stored.chat_template)
    )
    _check(model, stored, processor, tokenizer)
    if not changed and not model.resized:
        yield artifact
        return
    with tempfile.TemporaryDirectory() as directory:
        view = Path(directory)
        if model.resized:  # the artifact's tables have other rows
            write_checkpoint(model, view, dict(model.named_parameters()), "50GB")
        for file in () if model.resized else artifact.iterdir():
            if file.name in ("config.json", GENERATION_CONFIG, *_IMAGE_FILES) or ".safetensors" in file.name:
                (view / file.name).symlink_to(file.resolve())
        if changed:
            tokenizer.save_pretrained(view)
            (view / "chat_template.jinja").write_text(template or stored.chat_template, encoding="utf-8")
        yield view


def _check(model: VisionLanguageModel, stored: Any, processor: Any, tokenizer: Any) -> None:
    if tokenizer is not None and (highest := max(tokenizer.get_vocab().values())) >= model.vocabulary:
        raise UsageError(
            f"The tokenizer has token ids up to {highest}, but the model has embeddings for 0 to {model.vocabulary - 1}. Call "
            "model.resize_token_embeddings(len(tokenizer)) before add_lora."
        )
    images = getattr(processor, "image_processor", None)
    if images is not None and images.to_dict() != stored.image_processor.to_dict():
        raise UsageError(
            "The processor's image settings differ from the artifact's, which a merged model keeps. Pass the processor with "
            "its own settings, or edit processor_config.json of the merged directory and build from it."
        )
