"""A random Qwen2-VL checkpoint of published size: `python -m tests.bench.random_checkpoint OUT [--depth-factor 2]`.

Tensors are drawn and written one at a time in the published names, shards and dtype (bfloat16), the same for the same seed on
the same machine. The processor is the zoo's tokenizer with the published image settings.

Weights of independent entries make every layer amplify rounding as much as signal, so that a better quantizer shows nothing.
Here the residual stream lives in a subspace of `--rank` dimensions, as it does in trained models: weights that write to the
stream have their columns there, weights that read it have their rows there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.artifact.safetensors import encode_header, frame_header, tensor_bytes
from vlmbuild.families import Family, family_of
from vlmbuild.zoo import ZOO

CONFIG = Path(__file__).parents[1] / "configs" / "qwen2-vl-2b"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHARD_BYTES = 4_000_000_000
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv", "fc1")
READ, WRITTEN, EMBEDDED, BIAS = 1.0, 0.25, 0.02, 0.02
"""Root mean squares: of what a reader makes of a normalized stream and of what a writer adds, for inputs of 1; of embeddings,
which makes logits of about 4; of biases. 56 additions of 0.25 double the stream, and bfloat16 is far from its limits."""

Shapes = list[tuple[str, tuple[int, ...]]]


def write_checkpoint(output: Path, values: dict[str, Any], config: Path, seed: int, rank: int) -> int:
    """Make the directory and return the bytes of its tensors; holds one tensor at a time."""
    output.mkdir(parents=True)
    (output / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    shutil.copy(config / "preprocessor_config.json", output)
    for name in TOKENIZER:
        shutil.copy(ZOO["qwen2-vl-digits"] / name, output)
    family = family_of(values, str(output / "config.json"))
    shards = list(split(stored_shapes(family, values)))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(output / name, shapes, seed, rank)
        weight_map |= dict.fromkeys((tensor for tensor, _ in shapes), name)
    total = sum(nbytes(shape) for shapes in shards for _, shape in shapes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def stored_shapes(family: Family, values: dict[str, Any]) -> Shapes:
    """Published names and shapes, from a model on the meta device; tied tensors once."""
    from transformers import AutoModelForImageTextToText

    config = family.config(values)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    named = model.named_parameters(remove_duplicate=False)
    return [(family.stored_name(name), tuple(p.shape)) for name, p in named if name not in family.ties(config)]


def split(shapes: Shapes) -> Iterator[Shapes]:
    shard: Shapes = []
    for entry in shapes:
        if shard and sum(nbytes(shape) for _, shape in [*shard, entry]) > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def nbytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * torch.bfloat16.itemsize


def write_shard(file: Path, shapes: Shapes, seed: int, rank: int) -> None:
    entries, end = [], 0
    for name, shape in shapes:
        start, end = end, end + nbytes(shape)
        entries.append((name, torch.bfloat16, shape, start, end))
    with file.open("wb") as stream:
        stream.write(frame_header(encode_header(entries)))
        for name, shape in shapes:
            stream.write(tensor_bytes(draw(name, shape, seed, rank)))


def draw(name: str, shape: tuple[int, ...], seed: int, rank: int) -> Tensor:
    """Draw a stored tensor's values, bfloat16."""
    if len(shape) == 1:
        is_norm = name.endswith("weight")
        values = torch.ones(shape) if is_norm else BIAS * gaussian(f"{seed} {name}", *shape)
        return values.bfloat16()
    rows, columns = shape[0], math.prod(shape[1:])
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module in READERS or module in ("embed_tokens", "lm_head"):
        # A stream of root mean square 1 is sqrt(columns) long, and so is its projection on the subspace.
        gain = EMBEDDED * math.sqrt(columns / rank) if module not in READERS else READ / math.sqrt(columns)
        values = gaussian(f"{seed} {name}", rows, rank).mul_(gain) @ subspace(columns, seed, rank)
    else:
        gain = WRITTEN * math.sqrt(rows / rank / columns)
        values = subspace(rows, seed, rank).T @ gaussian(f"{seed} {name}", rank, columns).mul_(gain)
    return values.bfloat16().view(shape)


def subspace(width: int, seed: int, rank: int) -> Tensor:
    """Return `[rank, width]`, nearly orthonormal rows: the same for every weight at streams of one width."""
    return gaussian(f"{seed} subspace {width}", rank, width).div_(math.sqrt(width))


def gaussian(key: str, *shape: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config_values(config: Path, layers: int | None, vision_layers: int | None, factor: int) -> dict[str, Any]:
    """Return the published config.json, with other depths."""
    values: dict[str, Any] = json.loads((config / "config.json").read_text())
    values["num_hidden_layers"] = factor * (layers or values["num_hidden_layers"])
    values["max_window_layers"] = values["num_hidden_layers"]
    values["vision_config"]["depth"] = factor * (vision_layers or values["vision_config"]["depth"])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--config", type=Path, default=CONFIG, help="directory of a Qwen2-VL config.json")
    parser.add_argument("--layers", type=int, help="decoder layers; default: as the config says")
    parser.add_argument("--vision-layers", type=int, help="vision blocks; default: as the config says")
    parser.add_argument("--depth-factor", type=int, default=1, help="multiplies both")
    parser.add_argument("--rank", type=int, default=64, help="dimensions of the residual stream")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    values = config_values(arguments.config, arguments.layers, arguments.vision_layers, arguments.depth_factor)
    total = write_checkpoint(arguments.output, values, arguments.config, arguments.seed, arguments.rank)
    print(f"{arguments.output}: {total / 1e9:.2f} GB of tensors in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
