"""Train the zoo's tiny Qwen2-VL: `python -m vlmbuild.zoo.train OUTPUT [--warm-up N] [--steps N] [--seed N]`.

Everything is made here from a seed: the byte-level tokenizer with the family's special tokens, the processor's files, the
randomly initialised model of about 1.4 million parameters, and the training itself, with transformers' own model class.
Writes an ordinary checkpoint in the published layout and `training.json` with the script's arguments and figures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlmbuild.families._qwen2_vl_processor import ImageTextProcessor
from vlmbuild.zoo.digits import Digits, Sample
from vlmbuild.zoo.task import READ, exact_match, training_batch

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CORPUS = (
    READ.question,
    "user",
    "assistant",
    "system",
    "What is the largest digit?",
    "Read the digits backwards.",
    "How many digits are there?",
)
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of the family's kind: 256 bytes, a few merges, then the special tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=306, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(raw.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[misc]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=2048,
    )


def make_processor() -> Any:
    """The family's processor with the zoo's tokenizer and small pixel limits."""
    tokenizer = make_tokenizer()
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64},
        image_mean=[1.0] * 3,  # the paper is white: empty patches become zero
        image_std=[0.3] * 3,
    )
    return ImageTextProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def make_config(tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    """All layer kinds of Qwen2-VL: grouped queries, head_dim 128 with the published M-RoPE sections, tied head."""
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    vocabulary = (max(ids.values()) + 64) // 64 * 64
    return Qwen2VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 256,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={"depth": 3, "embed_dim": 64, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 4},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def cells_of(samples: list[Sample], grids: torch.Tensor) -> torch.Tensor:
    """The digit whose centre lies in each merged patch, 10 for none: `[sum of h * w / 4]`, in raster order.

    The zoo's merge size is 2, so that a grid `(1, h, w)` has `h/2 x w/2` merged patches.
    """
    cells = []
    for sample, (_, height, width) in zip(samples, grids.tolist(), strict=True):
        cell = torch.full((height // 2, width // 2), 10)
        for digit, (x, y) in zip(sample.digits, sample.centres, strict=True):
            cell[int(y * (height // 2)), int(x * (width // 2))] = digit
        cells.append(cell.flatten())
    return torch.cat(cells)


def warm_up(model: Any, processor: Any, stream: Digits, steps: int, batch_size: int, peak: float) -> None:
    """Teach the vision tower first: a linear probe on every merged patch names the digit centred there.

    Without it the language loss alone stays at chance for thousands of steps: nothing tells the tower what to look for.
    """
    probe = torch.nn.Linear(model.config.vision_config.hidden_size, 11)
    parameters = [*model.model.visual.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.05)
    accuracy = 0.0
    for step in range(1, steps + 1):
        samples = stream.take(batch_size)
        images = processor.image_processor([sample.image for sample in samples], return_tensors="pt")
        features = model.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
        logits, cells = probe(features), cells_of(samples, images["image_grid_thw"])
        torch.nn.functional.cross_entropy(logits, cells).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        filled = cells < 10
        accuracy = 0.98 * accuracy + 0.02 * float((logits.argmax(-1) == cells)[filled].float().mean())
        if step % 250 == 0:
            print({"warm-up step": step, "accuracy": round(accuracy, 3)}, flush=True)


def train(output: Path, steps: int, warm_up_steps: int, seed: int, batch_size: int = 64, peak: float = 2e-3) -> None:
    """Train from scratch and write the checkpoint."""
    torch.manual_seed(seed)
    processor = make_processor()
    config = make_config(processor.tokenizer)
    model: Any = Qwen2VLForConditionalGeneration(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    warm_up(model, processor, Digits("train", seed + 1, augment=True), warm_up_steps, batch_size, 1.5 * peak)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    stream, held_out = Digits("train", seed, augment=True), Digits("held_out", seed).take(500)
    log: list[dict[str, Any]] = []
    started, running = time.time(), 0.0
    for step in range(1, steps + 1):
        loss = model(**training_batch(processor, READ, stream.take(batch_size))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running = 0.98 * running + 0.02 * loss.item() if step > 1 else loss.item()
        if step % 250 == 0 or step == steps:
            log.append(
                {"step": step, "loss": round(running, 4), "exact_match": exact_match(model, processor, READ, held_out)}
            )
            print(log[-1], f"{time.time() - started:.0f} s", flush=True)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(output)
    processor.save_pretrained(output)
    final = exact_match(model.float(), processor, READ, Digits("held_out", seed + 1).take(1000))
    record = {
        "command": f"python -m vlmbuild.zoo.train OUTPUT --warm-up {warm_up_steps} --steps {steps} --seed {seed}",
        "held_out_exact_match": final,
        "held_out_samples": 1000,
        "log": log,
        "torch": torch.__version__,
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print("held-out exact match", final, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--warm-up", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.output, arguments.steps, arguments.warm_up, arguments.seed)
