"""Tiny Qwen2-VL models, batches and hand-made regions for the tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import Dim
from traces import traced
from transformers import Qwen2VLForConditionalGeneration

from vlmbuild.families import FAMILIES
from vlmbuild.ir.dims import parse_shape
from vlmbuild.ir.program import COMPUTE_DTYPE, Geometry, Program, Region, Slot
from vlmbuild.passes import passes_for, quantization_passes
from vlmbuild.quant.decide import decide
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.rewrite.pattern import trace

FAMILY = FAMILIES["qwen2_vl"]
VOCAB, START, END, IMAGE, VIDEO = 320, 316, 317, 318, 319
PIXELS = 1176
HEAD_DIM, SECTIONS = 128, (16, 24, 24)

Part = int | tuple[int, int, int] | tuple[str, int, int, int]
"""Part of a sample: a number of text tokens, an image's grid, or ("video", t, h, w)."""
Layout = Sequence[Sequence[Part]]


def config_values(layers: int = 3, depth: int = 2, tied: bool = True, **changes: Any) -> dict[str, Any]:
    """Write a nested config.json: two query heads on one key head, head size 128 with the published M-RoPE sections."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 2 * HEAD_DIM,
        "intermediate_size": 192,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": list(SECTIONS), "rope_theta": 1e6},
    }
    vision = {"depth": depth, "embed_dim": 64, "hidden_size": 2 * HEAD_DIM, "num_heads": 2}
    values = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": tied,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return values | changes


def flat(values):
    """Write a config.json as published, with text fields at the top level."""
    plain = {key: value for key, value in values.items() if key != "text_config"} | values["text_config"]
    rope = plain.pop("rope_parameters")
    return plain | {
        "model_type": values["model_type"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }


def make_config(layers: int = 3, depth: int = 2, tied: bool = True) -> Any:
    """Read `config_values`."""
    return FAMILY.config(config_values(layers, depth, tied))


def make_reference(config: Any, seed: int = 0) -> Any:
    """Make transformers' model in float32 with biases and norms away from their trivial start values."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).float().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name or "ln_q" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def capture_program(config: Any) -> Program:
    """Capture and outline a model, before any pass."""
    return traced(FAMILY, config)


def build(program: Program, **recipe: Any) -> Program:
    """Copy a captured program and run the passes of a recipe."""
    program = copy.deepcopy(program)
    options = Recipe(**{"dtype": "float32", **recipe})
    run(passes_for(options), program)
    run(quantization_passes(options, decide(program, options.quantize)), program)
    return program


def make_batch(layout: Layout, side: str = "right", seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Make a processor's output for a layout, and labels on real text tokens.

    The first token of a row is no label: transformers lets the last token of left padding predict it.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    grids: dict[int, list[tuple[int, ...]]] = {IMAGE: [], VIDEO: []}
    for sample in layout:
        row: list[int] = []
        for part in sample:
            if isinstance(part, int):
                row += torch.randint(0, 300, (part,), generator=generator).tolist()
                continue
            token, grid = (VIDEO, part[1:]) if part[0] == "video" else (IMAGE, part)
            t, h, w = grid
            grids[token].append(grid)
            row += [START] + [token] * (t * h * w // 4) + [END]
        rows.append(row)
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[number, span], mask[number, span] = torch.tensor(row), 1
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    for token, pixels, key in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[token]:
            batch[key] = torch.tensor(grids[token])
            batch[pixels] = torch.randn(int(batch[key].prod(-1).sum()), PIXELS, generator=generator)
    labels = ids.clone()
    labels[(mask == 0) | (types > 0)] = -100
    labels[torch.arange(len(rows)), mask.argmax(1)] = -100
    return batch, labels


BATCH, LABELS = make_batch([[5, (1, 4, 6), 7, (1, 8, 2), 3], [9, (1, 2, 2), 4]])
"""Two samples with images of three grids, right-padded."""
ATTENDED = BATCH["attention_mask"].bool()

BATCHES: dict[str, tuple[Layout, str]] = {
    "one image": ([[5, (1, 4, 6), 7]], "right"),
    "square": ([[1, (1, 8, 8), 2]], "right"),
    "image first": ([[(1, 6, 4), 9]], "right"),
    "image last": ([[9, (1, 2, 10)]], "right"),
    "two grids, left": ([[5, (1, 4, 6), 7, (1, 8, 2), 3], [9, (1, 2, 2), 4]], "left"),
    "two grids, right": ([[5, (1, 4, 6), 7, (1, 8, 2), 3], [9, (1, 2, 2), 4]], "right"),
    "three samples": ([[3, (1, 2, 6), 2], [4, (1, 6, 2), 11], [8, (1, 4, 4)]], "left"),
    "some without image": ([[5], [9, (1, 4, 4), 3], [14]], "right"),
    "some without image, left": ([[3, (1, 4, 8), 3], [6], [2]], "left"),
    "three images in a row": ([[(1, 2, 2), (1, 4, 2), (1, 2, 8), 6], [7]], "right"),
    "frames": ([[3, (3, 4, 4), 7], [4, (2, 6, 2), 11]], "right"),
    "video": ([[3, ("video", 3, 4, 6), 7], [4]], "left"),
    "video and image": ([[3, ("video", 2, 4, 2), 2, (1, 6, 6), 4], [4, (1, 2, 4), 2]], "right"),
    "text": ([[5], [9]], "left"),
    "one text": ([[7]], "right"),
}
"""Layouts and padding sides: different grids, several images in a sample, videos, text only; positions that differ on
their three axes."""


def linear_region(role: str = "language", features: tuple[int, int] = (64, 128), bias: bool = True) -> Region:
    """Make a region with one linear layer, "proj", on activations [1, tokens, in]."""
    out_features, in_features = features
    slots = [Slot("proj.weight", features, COMPUTE_DTYPE, "parameter", role)]
    slots += [Slot("proj.bias", (out_features,), COMPUTE_DTYPE, "parameter", role)] if bias else []

    def forward(weight, *rest):
        return (torch.nn.functional.linear(rest[-1], weight, rest[0] if bias else None),)

    return make_region("blocks", forward, slots, [("1", "tokens", in_features)], ("blocks.0", "blocks.1"))


def make_region(
    name: str, function: Any, slots: Sequence[Slot], activations: Any, instances: tuple[str, ...]
) -> Region:
    """Make a region of ordinary torch code over the slots and then the activations (compute dtype; names are dynamic)."""
    tokens = Dim("tokens")
    example = [torch.empty(slot.shape, dtype=slot.dtype, device="meta") for slot in slots]
    shapes: list[dict[int, Any]] = [{} for _ in slots]
    sizes = []
    for shape in activations:
        plain = [int(size) if str(size).isdigit() else size for size in shape]
        sizes.append(tuple(plain))
        example.append(
            torch.empty([11 if size == "tokens" else size for size in plain], dtype=COMPUTE_DTYPE, device="meta")
        )
        shapes.append({axis: tokens for axis, size in enumerate(plain) if size == "tokens"})
    graph = trace(function, tuple(example), tuple(shapes))
    module = torch.fx.GraphModule(torch.nn.Module(), graph, class_name="Region")
    symbols = {
        str(size): "tokens"
        for node in graph.nodes
        if node.op == "placeholder"
        for size in node.meta["val"].shape
        if not isinstance(size, int)
    }
    return Region(name, module, tuple(slots), instances, tuple(map(parse_shape, sizes)), dimensions=symbols)


def region_program(*regions: Region, rotary: tuple[Any, ...] = ()) -> Program:
    """Make a program of hand-made regions without variants."""
    return Program("qwen2_vl", Geometry(rotary), {}, {region.name: region for region in regions})


def operators(region: Region) -> list[str]:
    """List the names of a region's operators, sorted."""
    return sorted(str(node.target) for node in region.graph.graph.nodes if node.op == "call_function")
