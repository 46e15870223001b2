"""The zoo's SmolVLM2: tokenizer, processor, configuration, and what the warm-up probes. It starts from weights of
the zoo's Pixtral and Qwen2-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.zoo_training.probe import IGNORED, cells_of
from tests.zoo_training.start import start_from, trained
from tests.zoo_training.tokenizer import BASE_TOKENS, fast_tokenizer
from vlmbuild.demo.digits import Sample
from vlmbuild.families.idefics3.processor import ImageTextSmolVLMProcessor, tile_grid

WARM_UP_STEPS, STEPS = 3000, 2500  # of the first of three runs; the others are in training.json
EMPTY_WEIGHT = 0.1  # at least 12 of 16 features have no digit
PATCH, SCALE, SIDE = 16, 2, 4
"""Pixels of a patch; rows of patches that become one feature; rows of features of a tile."""
TILE = PATCH * SCALE * SIDE
MEAN, DEVIATION = 0.8, 0.3
"""Mean and standard deviation of pixels. White must not become zero: transformers drops tiles of zeros as padding."""
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<jupyter_script>",
    "<empty_output>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
TOWER = {
    "model.visual.blocks.": "model.vision_model.encoder.layers.",
    ".norm": ".layer_norm",
    ".attn.proj.": ".self_attn.out_proj.",
    "model.visual.merger.ln_q.": "model.vision_model.post_layernorm.",
}
"""Parts of Qwen2-VL's parameter names -> those of SmolVLM2."""
# As published: only lists of parts are read; a string's characters would be dropped.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def make_image_processor() -> Any:
    """Make the family's image processor. Images keep their size, and `size` is unused: up to 128 pixels a side they are one tile,
    larger ones one for every 128 x 128 pixels and the whole image."""
    return SmolVLMImageProcessorPil(
        do_resize=False,
        size={"longest_edge": 4 * TILE},
        max_image_size={"longest_edge": TILE},
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
    )


def make_processor() -> Any:
    """Make the family's processor with the zoo's tokenizer."""
    tokenizer = fast_tokenizer(SPECIAL_TOKENS, bos="<|im_start|>", eos="<end_of_utterance>", pad="<|im_end|>")
    return ImageTextSmolVLMProcessor(
        make_image_processor(), tokenizer, image_seq_len=SIDE**2, chat_template=CHAT_TEMPLATE
    )


def make_config(tokenizer: Any) -> SmolVLMConfig:
    """Make a config with all layer kinds of SmolVLM2: grouped queries, untied head, pixel shuffle."""
    return SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": BASE_TOKENS + len(SPECIAL_TOKENS),
            "hidden_size": 128,
            "head_dim": 64,  # four heads of it are wider than the hidden size
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        scale_factor=SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        dtype="float32",
    )


def make_model(config: Any) -> Any:
    """Make the model: its language model has the layers of the zoo's Pixtral, its tower most of those of the zoo's Qwen2-VL.

    Position embeddings, which that tower lacks, start as waves: attention has to find neighbours by them alone.
    """
    text = trained("pixtral-digits", {".language_model.": ".text_model."})
    model = start_from(SmolVLMForConditionalGeneration(config), {**text, **_tower()})
    with torch.no_grad():
        model.model.vision_model.embeddings.position_embedding.weight.copy_(_positions(TILE // PATCH, 64))
    return model


def _positions(side: int, size: int) -> Tensor:
    """Make waves over rows and columns of patches, so that attention can find neighbours from the start."""
    frequencies = torch.pi / side * (side / 2) ** torch.linspace(0, 1, size // 4)
    waves = torch.arange(side)[:, None] * frequencies
    axis = torch.cat((waves.sin(), waves.cos()), 1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return 0.5 * torch.cat((rows, columns), 2).flatten(0, 1)


def _tower() -> dict[str, Tensor]:
    """Return the weights of Qwen2-VL's tower by the names of SmolVLM2's."""
    tower = {}
    for name, weight in trained("qwen2-vl-digits", TOWER).items():
        if ".attn.qkv." not in name:
            tower[name] = weight
            continue
        for part, chunk in zip("qkv", weight.chunk(3), strict=True):
            tower[name.replace(".attn.qkv.", f".self_attn.{part}_proj.")] = chunk
    kernel = tower.pop("model.visual.patch_embed.proj.weight").sum(2)  # both frames of an image are the same
    area_ratio = (kernel.shape[-1] / PATCH) ** 2
    kernel = area_ratio * nn.functional.interpolate(kernel, (PATCH, PATCH), mode="bilinear", antialias=True)
    offset = (1.0 - MEAN) / DEVIATION * kernel.sum((1, 2, 3))  # Qwen2-VL's processor makes white zero
    patches = "model.vision_model.embeddings.patch_embedding"
    return {**tower, f"{patches}.weight": kernel, f"{patches}.bias": -offset}


def vision_modules(model: Any) -> tuple[nn.Module, ...]:
    """List the modules that the warm-up trains."""
    return model.model.vision_model, model.model.connector


def patch_features(model: Any, images: Any) -> Tensor:
    """Compute the features of every tile of a batch of images."""
    inputs = {name: images[name] for name in ("pixel_values", "pixel_attention_mask")}
    return torch.cat(model.model.get_image_features(**inputs).pooler_output)


def patch_cells(samples: Sequence[Sample], images: Any) -> Tensor:
    """Return the digit at each row of `patch_features`; `IGNORED` for tiles, which cut digits, before the whole image."""
    image_processor = make_image_processor()
    return torch.cat([_tile_cells(sample, image_processor) for sample in samples])


def _tile_cells(sample: Sample, image_processor: Any) -> Tensor:
    """Label the features of one image: `IGNORED` for its tiles, then the digits of the whole image, stretched to one tile."""
    rows, columns = tile_grid(image_processor, sample.image.height, sample.image.width)
    tiles = torch.full((rows * columns * SIDE**2,), IGNORED)
    return torch.cat([tiles, cells_of(sample, SIDE, SIDE).flatten()])
