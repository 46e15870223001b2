"""SmolVLM2, all sizes."""

from __future__ import annotations

import copy
import functools
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from processors import image_processor, shipped, with_special
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from setups.base import MLP, QKVO, Setup, make_setup
from vlmbuild.families import FAMILIES
from vlmbuild.families.idefics3.processor import ImageTextSmolVLMProcessor

FAMILY = FAMILIES["smolvlm"]

_BASE = 49135


def tags(rows: int) -> list[str]:
    """List the tags of an image cut into as many rows and columns of tiles."""
    return [
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, rows + 1) for column in range(1, rows + 1)),
    ]


_STARCODER = [
    "repo_name",
    "reponame",
    "file_sep",
    "filename",
    "gh_stars",
    "issue_start",
    "issue_comment",
    "issue_closed",
]
_STARCODER += [*(f"jupyter_{kind}" for kind in ("start", "text", "code", "output", "script")), "empty_output"]
# The first 17 begin the published vocabulary; here they follow what is learned, so that all others have their published ids.
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<{name}>" for name in _STARCODER),
    *tags(6),
    "<fake_token_around_image>",
    "<image>",
    *(f"<|reserved_special_token_{number}|>" for number in range(88)),
    "<end_of_utterance>",
]

# As published: only lists of parts are read; a string's characters would be dropped.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _vocabulary() -> Tokenizer:
    """Make a byte-level vocabulary of the published size: no package has SmolLM2's; these are the first tokens of Qwen's."""
    with shipped("dashscope", "resources/qwen.tiktoken").open() as whole, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokens")
        file.write_text("".join(islice(whole, _BASE)))
        tokenizer: Tokenizer = TikTokenConverter(str(file)).converted()
    digits, text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, text])  # type: ignore[assignment]  # stubs lack the setter
    tokenizer.model.ignore_merges = False  # as published; the converter of tiktoken's files says True
    return with_special(tokenizer, SPECIAL)


@functools.cache
def processor() -> Any:
    """Make SmolVLM2's processor, both small sizes."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_vocabulary(),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=8192,
    )
    images = image_processor("smolvlm2-500m")
    return ImageTextSmolVLMProcessor(images, tokenizer, image_seq_len=64, chat_template=SMOLVLM_TEMPLATE)


def with_tiles(whole: Any, side: int, features: int) -> Any:
    """Copy a processor with tiles of another size."""
    small = copy.copy(whole)
    small.image_processor = copy.copy(whole.image_processor)
    small.image_processor.max_image_size = {"longest_edge": side}
    small.image_seq_len = features
    return small


def setup(full: bool) -> Setup:
    """Make the setup; `full` has the published tiles of 512 pixels, else 40, of which 36 are patches."""
    side, patch, scale = (512, 16, 4) if full else (40, 6, 3)
    values = {
        "model_type": "smolvlm",
        "image_token_id": 49190,
        "scale_factor": scale,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49280,
            "num_hidden_layers": 3,
            "pad_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
        "vision_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "image_size": side,
            "patch_size": patch,
        },
    }
    return make_setup(
        FAMILY,
        with_tiles(processor(), side, (side // patch // scale) ** 2),
        {"longest_edge": 2 * side},
        values,
        largest=(4 * side, 4 * side),
        smallest=(1, 1),
        media=("<image>", "<fake_token_around_image>", *tags(2)),
        end="<end_of_utterance>",
        lead=" ",
        numbers=("vision_config.patch_size", "vision_config.image_size", "scale_factor"),
        layers={"attention": QKVO | {"out_proj"}, "mlp": MLP | {"fc1", "fc2"}},
    )
