"""Checks of a config.json before anything is made of it: ranges of numbers, rope types, activations, and each with the
others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.activations import ACT2FN

from vlmbuild.errors import SourceError

STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Types whose frequencies do not depend on the data."""

_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_global_layers"), 1024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "attention_heads"), 4096),
    **dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size", "head_dim"), 2**20),
    **dict.fromkeys(("vision_output_dim", "out_hidden_size"), 2**20),
    **dict.fromkeys(("in_channels", "in_chans", "num_channels", "spatial_merge_size", "max_num_tiles"), 64),
    "scale_factor": 64,
    **dict.fromkeys(("patch_size", "spatial_patch_size", "temporal_patch_size"), 1024),
    **dict.fromkeys(("image_size", "window_size", "tokens_per_second"), 2**14),
    "num_position_embeddings": 2**20,
    "num_labels": 2**16,
    "mm_tokens_per_image": 2**16,
    "vocab_size": 2**24,
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "sliding_window"), 2**31),
    "mrope_section": 2**16,
}
"""Field -> its highest value; each is a whole number, at least 1, or a list of such."""
_POSITIVE = {
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_eps"), 1.0),
    "rope_theta": 1e15,
    "mlp_ratio": 256.0,
    "query_pre_attn_scalar": 1e6,
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "attention_factor"), 1e6),
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), 1e6),
}
"""Field -> its highest value; each is a number above 0."""
_LISTS = ("mrope_section",)
"""Fields of these that are lists in every family."""
_LONGEST = 4096
"""Most entries of a list."""


def require(condition: bool, field: str, value: object, fault: str) -> None:
    """Raise SourceError for a value of config.json unless the condition holds; `fault` follows it in the message."""
    if not condition:
        raise SourceError(f"config.json: {field} {value!r} {fault}")


def check_values(values: Mapping[str, Any], lists: Sequence[str] = ()) -> None:
    """Raise SourceError for a number out of its range, a list too long, or an unknown activation, at any depth; fields named
    in `lists` may be lists of numbers in their range."""
    for field, key, value in _leaves(values):
        if value is None:
            continue
        if isinstance(value, list) and (key in (*_LISTS, *lists) or key not in _COUNTS.keys() | _POSITIVE.keys()):
            require(
                len(value) <= _LONGEST, field, f"of {len(value)} entries", f"may have {_LONGEST} at most. Shorten it."
            )
        elif key in _COUNTS:
            whole = isinstance(value, int) and not isinstance(value, bool)
            high = _COUNTS[key]
            require(
                whole and 1 <= value <= high,
                field,
                value,
                f"must be a whole number from 1 to {high}. Restore the published value.",
            )
        elif key in _POSITIVE:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            most = _POSITIVE[key]
            require(
                number and 0 < value <= most,
                field,
                value,
                f"must be a number above 0, up to {most:g}. Restore the published value.",
            )
        elif isinstance(value, int | float):
            require(
                abs(value) < 2**63,
                field,
                value,
                "must be finite and below 2**63 in size. Restore the published value.",
            )
        elif key.endswith(("hidden_act", "hidden_activation")):
            known = isinstance(value, str) and value in ACT2FN
            require(known, field, value, "is no activation of transformers. Restore the published name.")


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of all values at any depth; lists before their entries, which have the list's key."""
    pending: list[tuple[str, str, Any]] = [(str(key), str(key), value) for key, value in values.items()]
    while pending:
        path, key, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(f"{path}.{name}", str(name), entry) for name, entry in value.items()]
            continue
        value = list(value) if isinstance(value, tuple) else value  # configs make tuples of some lists
        yield path, key, value
        if isinstance(value, list):
            pending += [(f"{path}[{index}]", key, entry) for index, entry in enumerate(value)]


def check_text(text: Any) -> None:
    """Raise SourceError for language models that would be captured wrongly."""
    whole = text.rope_parameters
    for rope in (
        [whole] if "rope_type" in whole else [form for form in whole.values() if form]
    ):  # one, or one a kind of layer
        _check_rope(rope)
    dropout = getattr(text, "attention_dropout", 0) or getattr(text, "dropout", 0)
    require(not dropout, "attention dropout", dropout, "is not supported. Set it to 0, as published configs do.")
    check_heads("text_config", text.hidden_size, text.num_attention_heads, getattr(text, "head_dim", None), axes=1)
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    require(
        heads % groups == 0,
        "num_key_value_heads",
        groups,
        f"must divide num_attention_heads {heads}. Restore the published value.",
    )
    padding, rows = getattr(text, "pad_token_id", None), text.vocab_size
    require(
        padding is None or -rows <= padding < rows, "pad_token_id", padding, f"exceeds vocab_size {rows}. Correct it."
    )


def _check_rope(rope: Mapping[str, Any]) -> None:
    require(
        rope["rope_type"] in STATIC_ROPE_TYPES,
        "rope_type",
        rope["rope_type"],
        f"depends on the data and cannot be compiled. Use one of {', '.join(STATIC_ROPE_TYPES)}.",
    )
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        require(
            low < high, "low_freq_factor", low, f"must be below high_freq_factor {high}. Restore the published values."
        )


def check_heads(part: str, width: int, heads: int, head_size: int | None, axes: int) -> None:
    """Raise SourceError unless heads divide the width, and a head's size divides into pairs for each of the `axes`."""
    if head_size is None:
        require(
            width % heads == 0,
            f"{part}: width",
            width,
            f"must be a multiple of its {heads} heads. Restore the published values.",
        )
        head_size = width // heads
    if axes:
        require(
            head_size % (2 * axes) == 0,
            f"{part}: head size",
            head_size,
            f"must be a multiple of {2 * axes}. Restore the published value.",
        )


def check_placeholder(token: Any, field: str, rows: int) -> None:
    """Raise SourceError unless a token has an embedding."""
    known = isinstance(token, int) and 0 <= token < rows
    require(known, field, token, f"must be an id of the vocabulary, 0 to {rows - 1}. Restore the published value.")
