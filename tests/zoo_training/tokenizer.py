"""The zoo's byte-level vocabulary: 256 bytes and a few merges learned from the zoo's texts; each family adds its specials."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from vlmbuild.demo.task import READ

CORPUS = (
    READ.question,
    "user",
    "assistant",
    "system",
    "What is the largest digit?",
    "Read the digits backwards.",
    "How many digits are there?",
)
BASE_TOKENS = 306
"""Tokens before the special ones."""


def byte_level_bpe() -> Tokenizer:
    """Make a byte-level BPE tokenizer without special tokens, the same at every call."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=BASE_TOKENS, min_frequency=1, initial_alphabet=alphabet, show_progress=False),
    )
    return raw


def fast_tokenizer(special_tokens: Sequence[str], bos: str, eos: str, pad: str) -> PreTrainedTokenizerFast:
    """Make the vocabulary with special tokens from id `BASE_TOKENS` on, in their order."""
    raw = byte_level_bpe()
    raw.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=list(special_tokens),
        model_max_length=2048,
    )
