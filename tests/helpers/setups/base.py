"""A family's tiny model and real processor, and what tests must know of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.image_utils import SizeDict

from vlmbuild.families import Family


@dataclass(frozen=True)
class Setup:
    """A family's tiny model and real processor.

    Attributes:
        family: The family.
        values: Values of a tiny config.json.
        processor: Real, with its image processor's `size` lowered.
        largest, smallest: Images that it takes (width, height).
        media: Tokens that it writes for an image.
        end: Text that ends an answer.
        lead: Text between the generation prompt and an answer.
        numbers: Paths of whole numbers in config.json that the family alone has.
        layers: Names of linear layers by part, attention or mlp, language model and tower together.
        vocabulary: The processor's ids that the model has; None for all.
    """

    family: Family
    values: dict[str, Any]
    processor: Any
    largest: tuple[int, int]
    smallest: tuple[int, int]
    media: tuple[str, ...]
    end: str
    numbers: tuple[str, ...]
    layers: dict[str, set[str]]
    lead: str = ""
    vocabulary: torch.Tensor | None = None

    def config(self) -> Any:
        return self.family.config(self.values)

    def ids(self, tokens: Sequence[str]) -> torch.Tensor:
        """Look up the model's ids of special tokens."""
        return self.shrunk(torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(list(tokens))))

    def shrunk(self, ids: torch.Tensor) -> torch.Tensor:
        """Renumber the processor's ids as the model has them."""
        if self.vocabulary is None:
            return ids
        assert torch.isin(ids, self.vocabulary).all()  # searchsorted would take a neighbour
        return torch.searchsorted(self.vocabulary, ids)


TEXT = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def make_setup(family: Family, processor: Any, size: dict[str, int], values: dict[str, Any], **facts: Any) -> Setup:
    """Make the setup of a family whose image processor has this `size`."""
    processor = copy.copy(processor)
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.size = SizeDict(**size)
    values = {"architectures": list(family.architectures), **values, "text_config": TEXT | values["text_config"]}
    return Setup(family, values, processor, **facts)


def with_few_tokens(processor: Any) -> Any:
    """Copy a processor, with a tokenizer of single characters, a merge, without which llama.cpp opens no file, line breaks in a
    row, which Gemma's processor writes, and special tokens: a whole vocabulary takes seconds to load."""
    few = copy.copy(processor)
    few.tokenizer = copy.copy(processor.tokenizer)
    values = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    unknown = values["model"].get("unk_token")
    vocabulary = values["model"]["vocab"]
    merges = [pair for pair in values["model"]["merges"] if set("".join(pair)) == {"\n"}]
    merges = merges or [pair for pair in values["model"]["merges"] if "".join(pair) == "ĊĊ"]
    kept = {"".join(pair) for pair in merges} | {unknown}
    characters = [token for token in vocabulary if len(token) == 1 or token in kept]
    values["model"] |= {"vocab": {token: number for number, token in enumerate(characters)}, "merges": merges}
    for number, token in enumerate(values["added_tokens"], start=len(characters)):
        token["id"] = number
    few.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(values))
    return few
