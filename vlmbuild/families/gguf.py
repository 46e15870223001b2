"""Support for llama.cpp: a family's names, numbers and cuts of tensors, in the words of the package `gguf`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vlmbuild.errors import SourceError
from vlmbuild.families.config_checks import require


@dataclass(frozen=True, slots=True)
class GgufPart:
    """A tensor of a GGUF file, cut from one parameter.

    Attributes:
        name: Name that the package's table translates, with its suffix; with `kind`, the suffix alone.
        kind: Name in `gguf.MODEL_TENSOR` of a tensor that the table cannot find.
        block: Number of the tensor's block.
        rows: First row of the parameter and the one after the last; None for all.
        frame: Index on the third axis; None for all.
        head_rows: Rows of a head whose halves the model rotates against each other, and llama.cpp as pairs; 0 leaves rows as
            they are.
        added: What is added to every value, and to none in the program.
        vision: Whether it is in the file of the tower, whatever the parameter's role; None for what the role says.
        copied: Whether the parameter is stored whole elsewhere.
    """

    name: str
    kind: str = ""
    block: int | None = None
    rows: tuple[int, int] | None = None
    frame: int | None = None
    head_rows: int = 0
    added: float = 0.0
    vision: bool | None = None
    copied: bool = False


LANCZOS, BILINEAR, BICUBIC = 1, 2, 3
"""Filters by Pillow's numbers."""

Parts = Callable[[str, tuple[int, ...]], tuple[GgufPart, ...] | None]
"""(name in the table's words, shape of the parameter) -> its tensors; None for one tensor of that name."""


def whole(name: str, shape: tuple[int, ...]) -> None:
    """Leave every parameter as it is."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model as llama.cpp reads it.

    Attributes:
        arch: Name in `gguf.MODEL_ARCH`.
        projector: Name in `gguf.VisionProjectorType`.
        text: Metadata of the language model: method of `gguf.GGUFWriter` without its `add_` -> value.
        vision: Metadata of the tower and the projector.
        image: What the chat template writes for an image, and llama.cpp's marker takes the place of.
        template: Chat template in the language of Ollama.
        parts: Cuts of parameters.
        table_names: Leading parts of tower names, and what the package's table has in their place.
        rope_factors: What each rotary frequency is divided by; () for none.
    """

    arch: str
    projector: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image: str
    template: str
    parts: Parts = whole
    table_names: Mapping[str, str] = field(default_factory=dict)
    rope_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class GgufImages:
    """How llama.cpp resizes images.

    Attributes:
        values: Metadata, as in `GgufModel`.
        tokens: Fewest and most tokens of an image, which llama.cpp has to be told when it starts; None where it has no limits.
        differs: How its sizes differ from the processor's; "" where they do not.
    """

    values: Mapping[str, Any]
    tokens: tuple[int, int] | None = None
    differs: str = ""


class ForGguf:
    """The part of a family that serves llama.cpp; here, families that it does not know.

    Attributes:
        title: Name for people.
        no_gguf: Why there is no GGUF file of the family.
    """

    title: str
    no_gguf: str = "llama.cpp has no such model"

    def gguf_model(self, config: Any, processor: Any = None) -> GgufModel:
        """Describe a model to llama.cpp; without its processor, copies of embeddings are left out.

        Raises:
            SourceError: llama.cpp would compute something else, or cannot compute it.
        """
        raise SourceError(f"{self.title} cannot be written as GGUF: {self.no_gguf}. Choose --target onnx or trainable.")

    def gguf_images(self, config: Any, processor: Any) -> GgufImages:
        """Describe the processor's images. Raises SourceError for settings that llama.cpp does not have."""
        raise NotImplementedError


def text_values(text: Any) -> dict[str, Any]:
    """Return the metadata that every language model has, with its rotary embedding."""
    values = {
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size,
        "head_count": text.num_attention_heads,
        "head_count_kv": text.num_key_value_heads,
        "key_length": head_size(text),
        "value_length": head_size(text),
        "layer_norm_rms_eps": text.rms_norm_eps,
        "vocab_size": text.vocab_size,
        "rope_dimension_count": head_size(text),
    }
    act = getattr(text, "hidden_activation", None) or text.hidden_act
    require(
        act in ("silu", "gelu_pytorch_tanh"), "hidden_act", act, "is not what llama.cpp computes. Choose --target onnx."
    )
    return values


def head_size(text: Any) -> int:
    """Return the size of a head of a language model."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def rope_values(rope: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Return the metadata of a rotary embedding; kinds in `others` have `rope_factors` instead.

    Raises SourceError for kinds that llama.cpp computes otherwise.
    """
    values: dict[str, Any] = {"rope_freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    fault = "cannot be written as GGUF: default, linear, yarn and, in a Llama, llama3 can. Choose --target onnx."
    require(kind in ("default", "linear", "yarn", *others), "rope_type", kind, fault)
    if kind == "default" or kind in others:
        return values
    values |= {"rope_scaling_type": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind == "yarn":
        values["rope_scaling_orig_ctx_len"] = int(rope["original_max_position_embeddings"])
        for key, name in (
            ("attention_factor", "attn_factor"),
            ("beta_fast", "beta_fast"),
            ("beta_slow", "beta_slow"),
        ):
            if rope.get(key) is not None:
                values[f"rope_scaling_yarn_{name}"] = float(rope[key])
    return values


def vision_values(
    projection: int, *, side: int, patch: int, width: int, hidden: int, blocks: int, heads: int, eps: float
) -> dict[str, Any]:
    """Return the metadata that every tower has.

    Args:
        projection: Width of the language model.
        side, patch: Side of an image and of a patch, in pixels.
        width: Width of the tower.
        hidden: Width of its feed-forward layers.
        blocks, heads: Number of its blocks, and of the heads of each.
        eps: Epsilon of its norms.
    """
    return {
        "clip_has_vision_encoder": True,
        "vision_projection_dim": projection,
        "vision_image_size": side,
        "vision_patch_size": patch,
        "vision_embedding_length": width,
        "vision_feed_forward_length": hidden,
        "vision_block_count": blocks,
        "vision_head_count": heads,
        "vision_attention_layernorm_eps": eps,
    }


def siglip_values(projection: int, vision: Any, eps: float) -> dict[str, Any]:
    """Return `vision_values` of a tower whose config has the field names of SigLIP's."""
    return vision_values(
        projection,
        side=vision.image_size,
        patch=vision.patch_size,
        width=vision.hidden_size,
        hidden=vision.intermediate_size,
        blocks=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        eps=eps,
    )


def pixel_values(images: Any, resample: int) -> dict[str, Any]:
    """Return the metadata of an image processor's colors. Raises SourceError for a filter or a scale that llama.cpp lacks."""
    found = int(getattr(images, "resample", resample))
    require(found == resample, "resample", found, f"must be {resample}: llama.cpp has no choice. Choose --target onnx.")
    scale = float(images.rescale_factor)
    require(math.isclose(scale, 1 / 255, rel_tol=1e-6), "rescale_factor", scale, "must be 1/255. Choose --target onnx.")
    for setting in ("do_resize", "do_rescale", "do_normalize"):
        require(
            getattr(images, setting), setting, False, "must be true: llama.cpp always does it. Choose --target onnx."
        )
    return {
        "vision_image_mean": [float(value) for value in images.image_mean],
        "vision_image_std": [float(value) for value in images.image_std],
    }


CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
"""Ollama's form of a chat template with `<|im_start|>`."""
INST = (
    '<s>{{- range .Messages }}{{ if eq .Role "assistant" }}{{ .Content }}</s>{{ else }}[INST]{{ .Content }}[/INST]{{ end }}'
    "{{ end }}"
)
"""Ollama's form of a chat template with `[INST]`."""

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES: Final = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
SPLITS: Final[dict[tuple[tuple[str, ...], bool], str]] = {
    ((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",), False): "qwen2",
    ((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_CASES}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), True): "tekken",
    (("digits", "bytes"), False): "smollm",
    (("bytes",), False): "gpt-2",
}
"""(how text is split before merging, whether whole words that are tokens skip merging) -> llama.cpp's name for it. Read from
`llama-vocab.cpp`: the name is all that a file may say, and llama.cpp splits by rules of its own under it."""
