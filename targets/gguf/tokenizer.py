"""The tokenizer of a checkpoint in llama.cpp's words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vlmbuild.errors import SourceError
from vlmbuild.families.gguf import SPLITS
from vlmbuild.quant.gguf import gguf_package

_SPACE: Final = "▁"


def tokenizer_values(files: Mapping[str, bytes], tokenizer: Any, rows: int, template: str | None) -> dict[str, Any]:
    """Return the metadata of a tokenizer: method of `gguf.GGUFWriter` without its `add_` -> value.

    Args:
        files: The checkpoint's processor files.
        tokenizer: The same tokenizer as transformers loads it.
        rows: Rows of the embedding table.
        template: Chat template.

    Raises:
        SourceError: llama.cpp would split text otherwise.
    """
    values = json.loads(files["tokenizer.json"]) if "tokenizer.json" in files else _saved(tokenizer)
    model = values["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"its model is {model.get('type')!r}, not BPE")
    plain = bool(model.get("byte_fallback"))
    found = _pieces(values, rows) if plain else _bytes(values, rows)
    return {**found, **_special(tokenizer), **({"chat_template": template} if template else {})}


def _saved(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _unknown(problem: str) -> SourceError:
    return SourceError(
        f"tokenizer.json cannot be written as GGUF: {problem}, and llama.cpp knows {', '.join(SPLITS.values())} and "
        "SentencePiece's BPE. Choose --target onnx."
    )


def _bytes(values: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Describe BPE over bytes."""
    model = values["model"]
    key = (_splits(values.get("pre_tokenizer")), bool(model.get("ignore_merges")))
    if key not in SPLITS:
        raise _unknown(f"text is split by {' then '.join(key[0])!r} with ignore_merges {key[1]}")
    if (kind := (values.get("normalizer") or {}).get("type")) not in (None, "NFC"):
        raise _unknown(f"its normalizer is {kind}")
    tokens, types = _tokens(values, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": SPLITS[key],
        "token_list": tokens,
        "token_types": types,
        **({"token_merges": merges} if merges else {}),
    }


def _pieces(values: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Describe BPE over SentencePiece's pieces: llama.cpp merges by scores, here the rank of the merge that makes a piece."""
    model, rules = values["model"], _flat(values.get("normalizer"), "normalizers")
    kinds = [rule["type"] for rule in rules]
    if kinds not in (["Replace"], ["Prepend", "Replace"]) or rules[-1]["content"] != _SPACE:
        raise _unknown(f"its normalizer is {' then '.join(kinds)}")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    tokens, types = _tokens(values, rows, plain=True)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": tokens,
        "token_scores": scores,
        "token_types": types,
        "add_space_prefix": kinds[0] == "Prepend",
    }


def _tokens(values: Mapping[str, Any], rows: int, plain: bool = False) -> tuple[list[str], list[int]]:
    """Return the text and the kind of the token of every row; rows beyond the vocabulary are unused."""
    kinds = gguf_package().TokenType
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [int(kinds.UNUSED)] * rows
    unknown = values["model"].get("unk_token")
    for text, row in values["model"]["vocab"].items():
        if row >= rows:
            raise SourceError(
                f"tokenizer.json has the token {row}, and the embeddings have {rows} rows. Restore the files."
            )
        is_byte = plain and len(text) == len("<0x00>") and text.startswith("<0x")
        tokens[row], types[row] = text, int(kinds.BYTE if is_byte else kinds.NORMAL)
        if plain and text == unknown:
            types[row] = int(kinds.UNKNOWN)
    for token in values.get("added_tokens", []):
        row, text = token["id"], token["content"]
        if row >= rows:
            continue  # no embedding: no prompt of the model has it
        if types[row] == kinds.UNKNOWN:
            continue
        tokens[row] = text if token["special"] else text.replace(_SPACE, " ")
        types[row] = int(kinds.CONTROL if token["special"] else kinds.USER_DEFINED)
    return tokens, types


def _flat(value: Any, key: str) -> list[Any]:
    """List the steps of a normalizer or a pre-tokenizer."""
    if value is None:
        return []
    return list(value[key]) if value["type"] == "Sequence" else [value]


def _splits(value: Any) -> tuple[str, ...]:
    """Describe how text is split before merging."""
    found = []
    for step in _flat(value, "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex", step["pattern"].get("String", "")))
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += ["bytes"] if step["use_regex"] else []
        else:
            found.append(f"unknown {step['type']}")
    return tuple(found)


def _special(tokenizer: Any) -> dict[str, Any]:
    """Return the ids of special tokens, and which of them the tokenizer adds by itself."""
    values = {}
    for name in ("bos", "eos", "unk", "pad"):
        if (row := getattr(tokenizer, f"{name}_token_id")) is not None:
            values[f"{name}_token_id"] = int(row)
    added: Sequence[int] = tokenizer("").input_ids
    values["add_bos_token"] = bool(added) and added[0] == tokenizer.bos_token_id
    values["add_eos_token"] = (
        bool(added) and added[-1] == tokenizer.eos_token_id and len(added) > values["add_bos_token"]
    )
    return values
