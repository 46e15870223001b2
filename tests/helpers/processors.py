"""The families' real processors, offline: vocabularies, image settings and photographs that PyPI packages ship.

`dashscope` has Qwen's vocabulary, `llama-models` Llama 3's, `mistral-common` Pixtral's, `scikit-image` photographs. Only
their files are read; none of the packages is imported. Image settings are the published ones in `configs/`.
"""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, normalizers
from transformers import AutoImageProcessor, MllamaProcessor, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.mistral.tokenizer import MistralConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

from vlmbuild.families.pixtral.processor import ImageTextPixtralProcessor
from vlmbuild.families.qwen2_vl.processor import ImageTextProcessor

CONFIGS = Path(__file__).parents[1] / "configs"

QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
_LLAMA_NAMED = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
# Meta's own tokenizer has <|image|> at 128011; published for transformers, it is the last, behind all reserved ones.
LLAMA_SPECIAL = [*_LLAMA_NAMED, *(f"<|reserved_special_token_{2 + index}|>" for index in range(245)), "<|image|>"]

# Equal to the published templates for system, user and assistant messages of text and images; tools are left out.
QWEN_TEMPLATE = """\
{%- set pictures = namespace(count=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != "system" -%}
{{ "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" }}
{%- endif -%}
{{ "<|im_start|>" + message.role + "\\n" }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}
{%- set pictures.count = pictures.count + 1 -%}
{%- if add_vision_id -%}{{ "Picture " ~ pictures.count ~ ": " }}{%- endif -%}
{{ "<|vision_start|><|image_pad|><|vision_end|>" }}
{%- elif part.type == "video" -%}
{{ "<|vision_start|><|video_pad|><|vision_end|>" }}
{%- elif "text" in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""
# A system message is only allowed before text without images; the date is today's in the published one, fixed here.
LLAMA_TEMPLATE = """\
{%- set found = namespace(image=false) -%}
{%- set system = "" -%}
{%- if messages[0].role == "system" -%}
{%- set first = messages[0].content -%}
{%- set system = (first if first is string else first | map(attribute="text") | join) | trim -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages if message.content is not string -%}
{%- for part in message.content if part.type == "image" -%}{%- set found.image = true -%}{%- endfor -%}
{%- endfor -%}
{{ bos_token }}
{%- if found.image and system -%}
{{ raise_exception("Prompting with images is incompatible with system messages.") }}
{%- elif not found.image -%}
{{ "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + (date_string or "26 Jul 2024") + "\\n\\n" + system + "<|eot_id|>" }}
{%- endif -%}
{%- for message in messages -%}
{{ "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ "<|image|>" if part.type == "image" else part.text }}
{%- endfor -%}
{%- endif -%}
{{ "<|eot_id|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif -%}
"""
# The system message goes into the last user's message; the answer of the assistant ends with the end token.
PIXTRAL_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}
{{ content }}
{%- else -%}
{%- for part in content -%}{{ "[IMG]" if part.type == "image" else part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = "" -%}
{%- if messages[0].role == "system" -%}
{%- set system = text(messages[0].content) + "\\n\\n" -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{{ bos_token }}
{%- for message in messages -%}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) -%}
{{ raise_exception("User and assistant must take turns.") }}
{%- elif message.role == "user" -%}
{{ "[INST]" + (system if loop.last else "") + text(message.content) + "[/INST]" }}
{%- else -%}
{{ text(message.content) + eos_token }}
{%- endif -%}
{%- endfor -%}
"""


def shipped(distribution: str, name: str) -> Path:
    """Find a file of an installed distribution without importing it."""
    files = metadata.files(distribution) or []
    return next(Path(str(file.locate())) for file in files if file.as_posix().endswith(name))


@functools.cache
def qwen2_vl() -> Any:
    """Make Qwen2-VL's processor, all sizes."""
    converter = TikTokenConverter(str(shipped("dashscope", "resources/qwen.tiktoken")), pattern=PRETOKENIZE_REGEX)
    backend = _with_special(converter.converted(), QWEN_SPECIAL)
    backend.normalizer = normalizers.NFC()
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=backend,
        unk_token=None,  # type: ignore[arg-type]  # as published; the annotation is too narrow
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=QWEN_SPECIAL[1:],
        model_max_length=32768,
    )
    return ImageTextProcessor(_image_processor("qwen2-vl-2b"), tokenizer, chat_template=QWEN_TEMPLATE)


@functools.cache
def mllama() -> Any:
    """Make Llama 3.2 Vision's processor, both sizes."""
    converter = TikTokenConverter(str(shipped("llama-models", "llama3/tokenizer.model")))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_with_special(converter.converted(), LLAMA_SPECIAL),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=131072,
    )
    return MllamaProcessor(_image_processor("llama-3.2-11b-vision"), tokenizer, chat_template=LLAMA_TEMPLATE)


@functools.cache
def pixtral() -> Any:
    """Make Pixtral 12B's processor."""
    converter = MistralConverter(str(shipped("mistral-common", "data/tekken_240911.json")))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=1024000,
    )
    return ImageTextPixtralProcessor(_image_processor("pixtral-12b"), tokenizer, chat_template=PIXTRAL_TEMPLATE)


@functools.cache
def photographs() -> dict[str, Image.Image]:
    """Read photographs by name; width x height: astronaut and camera (grey, made RGB) 512x512, chelsea 451x300, coffee 600x400,
    hubble_deep_field 1000x872, retina 1411x1411, rocket 640x427; wide 1000x100 and tall 50x872 are crops."""
    files = (
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
        "rocket.jpg",
    )
    paths = [shipped("scikit-image", f"skimage/data/{file}") for file in files]
    whole = {path.stem: Image.open(path).convert("RGB") for path in paths}
    sky = whole["hubble_deep_field"]
    return whole | {"wide": sky.crop((0, 400, 1000, 500)), "tall": sky.crop((450, 0, 500, 872))}


def _with_special(tokenizer: Tokenizer, special: list[str]) -> Tokenizer:
    tokenizer.add_special_tokens(special)
    return tokenizer


def _image_processor(config: str) -> Any:
    return AutoImageProcessor.from_pretrained(CONFIGS / config, backend="pil", local_files_only=True)
