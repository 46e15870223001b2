"""Tokenizers as llama.cpp reads them."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import gguf
import pytest

import vlmbuild
from vlmbuild.families.gguf import SPLITS
from vlmbuild.targets.gguf.tokenizer import tokenizer_values
from vlmbuild.zoo import ZOO

VALUES = json.loads((ZOO["qwen2-vl-digits"] / "tokenizer.json").read_text())


def special(text):
    return SimpleNamespace(input_ids=[])


special.bos_token_id, special.eos_token_id, special.unk_token_id, special.pad_token_id = None, 306, None, 307


def values_of(change=lambda values: None, rows=330):
    values = copy.deepcopy(VALUES)
    change(values)
    return tokenizer_values({"tokenizer.json": json.dumps(values).encode()}, special, rows, "{{ x }}")


def test_tokens_merges_and_kinds():
    found = values_of()
    assert (found["tokenizer_model"], found["tokenizer_pre"]) == ("gpt2", "qwen2")
    kinds = gguf.TokenType
    assert [found["token_types"][row] for row in (0, 306, 329)] == [kinds.NORMAL, kinds.CONTROL, kinds.UNUSED]
    assert found["token_list"][306] == "<|im_end|>"
    assert len(found["token_list"]) == 330
    assert found["token_merges"][0] == "d i"
    assert (found["eos_token_id"], found["pad_token_id"]) == (306, 307)
    assert "bos_token_id" not in found
    assert not found["add_bos_token"]
    assert found["chat_template"] == "{{ x }}"


def test_other_splits_are_refused():
    def change(values):
        values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-z]+"

    with pytest.raises(vlmbuild.VlmbuildError, match=r"\[a-z\]\+"):
        values_of(change)


def test_tokens_need_a_row():
    with pytest.raises(vlmbuild.VlmbuildError, match="200"):
        values_of(rows=200)


def test_unigrams_are_refused():
    with pytest.raises(vlmbuild.VlmbuildError, match="Unigram"):
        values_of(lambda values: values["model"].update(type="Unigram"))


def test_pieces_are_scored_by_their_merges():
    values = {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "▁": 4, "ab": 5, "▁ab": 6},
            "merges": [["a", "b"], ["▁", "ab"]],
        },
        "added_tokens": [{"id": 7, "content": "▁▁", "special": False}, {"id": 0, "content": "<unk>", "special": True}],
    }
    found = tokenizer_values({"tokenizer.json": json.dumps(values).encode()}, special, 8, None)
    kinds = gguf.TokenType
    assert found["tokenizer_model"] == "llama"
    assert [found["token_types"][row] for row in (0, 1, 2, 7)] == [
        kinds.UNKNOWN,
        kinds.BYTE,
        kinds.NORMAL,
        kinds.USER_DEFINED,
    ]
    assert found["token_list"][7] == "  "
    assert found["token_scores"][5:7] == [0.0, -1.0]
    assert not found["add_space_prefix"]


def test_names_of_splits_are_distinct():
    assert len(set(SPLITS.values())) == len(SPLITS)
