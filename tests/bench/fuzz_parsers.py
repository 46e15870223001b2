"""Valid files of each format that vlmbuild reads, for `tests.bench.fuzz`, and the functions that read them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Parser(NamedTuple):
    """A file's format, and the function that reads it.

    Attributes:
        seeds: Makes valid contents.
        read: Reads the file at a path; raises VlmbuildError for what it refuses.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]


def _locks() -> list[bytes]:
    text = (ROOT / "artifacts" / "locks" / "qwen2-vl-2b-none-sdpa.lock").read_text(encoding="utf-8")
    text = re.sub(r"(graph = '''\n).*?'''", r"\1  in0: f32[1]\n'''", text, flags=re.DOTALL)  # listings are not parsed
    return [text.encode()]


def _read_lock(path: Path) -> object:
    from vlmbuild.locks.document import read_lock

    return read_lock(path).to_text()


def _recipes() -> list[bytes]:
    return [
        (
            b'target = "trainable"\nattention = "sdpa"\ndtype = "float32"\nrequire = ["fuse_rope"]\n\n[quantize]\nformat = "nf4"\n'
            b'blocksize = 64\ndouble_quant = true\nskip = ["*.o_proj"]\nroles = ["language"]\n\n[[quantize.overrides]]\n'
            b'pattern = "*.down_proj"\nformat = "fp4"\nblocksize = 128\n'
        ),
        b'quantize = "int8"\n',
        b'[quantize]\nformat = "auto"\nbudget = 4.5\n',
    ]


def _read_recipe(path: Path) -> object:
    from vlmbuild.recipe import Recipe

    return Recipe.from_toml(path).fingerprint()


def _manifests() -> list[bytes]:
    from vlmbuild.artifact.manifest import FileEntry, Manifest

    files = tuple(FileEntry(path, 5, "ab" * 32, role) for path, role in (("config.json", "config"), ("x.pt2", "code")))
    passes = ({"name": "fuse_rope", "matches": 3, "refusals": ["a: b"], "decisions": {"x": 1}},)
    recipe = {"target": "trainable", "quantize": {"format": "nf4"}}
    manifest = Manifest(
        "n", "trainable", files, ({"uri": "zoo:x"},), recipe, passes, {"torch": "2.13"}, ({"a": "0x1p-3"},)
    )
    return [manifest.to_bytes()]


def _read_manifest(path: Path) -> object:
    from vlmbuild.artifact.manifest import Manifest

    return Manifest.from_bytes(path.read_bytes()).id


def _programs() -> list[bytes]:
    from vlmbuild.artifact.canonical import canonical_json
    from vlmbuild.ir.serialize import SCHEMA

    slot = {"name": "head.weight", "shape": [8, 4], "dtype": "compute", "kind": "parameter", "role": "head"}
    nodes = [
        {"op": "aten.view.default", "args": [{"node": 1}, [-1, 4]]},
        {"op": "aten.linear.default", "args": [{"node": 2}, {"node": 0}]},
        {"op": "aten.mul.Tensor", "args": [{"node": 3}, {"float": "0x1p-1"}]},
        {"op": "aten.to.dtype", "args": [{"node": 4}, {"dtype": "float32"}]},
    ]
    region = {
        "name": "head",
        "instances": [""],
        "slots": [slot],
        "recipes": [],
        "activations": [["sequence", 4]],
        "nodes": nodes,
        "results": [{"node": 5}],
    }
    call = {"region": "head", "instance": "", "inputs": ["x"], "outputs": ["y"]}
    entry = {"name": "x", "dtype": "compute", "shape": ["sequence", 4]}
    program = {
        "schema": SCHEMA,
        "family": "qwen2_vl",
        "ties": {"lm_head.weight": "head.weight"},
        "regions": [region],
        "rotary": [{"head_dim": 8, "sections": [1, 1, 2], "shared": False, "scaling": "0x1p+0"}],
        "variants": {"text": {"inputs": [entry], "calls": [call], "output": "y"}},
    }
    return [canonical_json(program)]


def _read_program(path: Path) -> object:
    from vlmbuild.artifact.canonical import parse_canonical
    from vlmbuild.ir.serialize import from_json

    return from_json(parse_canonical(path.read_bytes(), where=path.name))


def _code_indices() -> list[bytes]:
    from vlmbuild.runtime.aoti.platform import this_platform

    file = {"file": "code/x/a.pt2", "inputs": [[0, "float32"], [1, "int64"]]}
    entry = {"graph": "ab" * 32, "code": file, "token": {**file, "file": "code/x/b.pt2"}, "token_axis": [0, 1]}
    regions = {form: {"layers": entry} for form in ("dynamic", "static")}
    platform = this_platform().record()
    return [json.dumps({"platform": platform, "dtype": "float32", "regions": regions}).encode()]


def _read_code_index(path: Path) -> object:
    from vlmbuild.runtime.aoti.code import read_index
    from vlmbuild.runtime.aoti.platform import check_platform

    index = read_index(lambda _: path.read_bytes(), "artifact")
    check_platform(index.platform, "artifact")
    return index.record()


def _configs() -> list[bytes]:
    from vlmbuild.zoo import ZOO

    return [(ZOO[name] / "config.json").read_bytes() for name in sorted(ZOO)]


def _read_config(path: Path) -> object:
    from vlmbuild.checkpoint.checkpoint import Checkpoint
    from vlmbuild.checkpoint.source import Source

    return Checkpoint(Source(path.parent, "fuzz")).config


_NAMES = {"base_model.model.a.lora_A.weight": (4, 8), "base_model.model.a.lora_B.weight": (8, 4)}


def _tensors() -> list[bytes]:
    import torch
    from safetensors.torch import save

    return [save({name: torch.zeros(shape) for name, shape in _NAMES.items()}, {"format": "pt"})]


def _read_tensors(path: Path) -> object:
    from vlmbuild.artifact.safetensors import read_header

    with path.open("rb") as stream:
        return read_header(stream.fileno(), path, path.name)


def _indices() -> list[bytes]:
    return [
        json.dumps({"metadata": {"total_size": 256}, "weight_map": dict.fromkeys(_NAMES, "one.safetensors")}).encode()
    ]


def _read_index(path: Path) -> object:
    from vlmbuild.artifact.weights_reader import CheckpointWeights

    (path.parent / "one.safetensors").write_bytes(_tensors()[0])
    return CheckpointWeights(path.parent)


def _adapters() -> list[bytes]:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "bias": "none"}
    patterns = {
        "rank_pattern": {"a": 4},
        "alpha_pattern": {"a": 2.0},
        "target_modules": ["a"],
        "modules_to_save": ["b"],
    }
    return [json.dumps(plain | patterns).encode()]


def _read_adapter(path: Path) -> object:
    from vlmbuild.adapters.peft_files import read_adapter

    (path.parent / "adapter_model.safetensors").write_bytes(_tensors()[0])
    return read_adapter(path.parent)


def _quant_states() -> list[bytes]:
    import torch

    from vlmbuild.quant.bnb_state import QuantState

    states = (QuantState("nf4", 64, torch.bfloat16, (24, 64), offset) for offset in (None, 0.25))
    return [bytes(state.pack().tolist()) for state in states]


def _read_quant_state(path: Path) -> object:
    import torch

    from vlmbuild.quant.bnb_state import parse_quant_state

    return parse_quant_state(torch.tensor(list(path.read_bytes()), dtype=torch.uint8))


PARSERS: dict[str, tuple[str, Parser]] = {
    "lock": ("x.lock", Parser(_locks, _read_lock)),
    "recipe": ("recipe.toml", Parser(_recipes, _read_recipe)),
    "manifest": ("manifest.json", Parser(_manifests, _read_manifest)),
    "program": ("program.json", Parser(_programs, _read_program)),
    "code": ("index.json", Parser(_code_indices, _read_code_index)),
    "config": ("config.json", Parser(_configs, _read_config)),
    "tensors": ("model.safetensors", Parser(_tensors, _read_tensors)),
    "index": ("model.safetensors.index.json", Parser(_indices, _read_index)),
    "adapter": ("adapter_config.json", Parser(_adapters, _read_adapter)),
    "quant_state": ("state", Parser(_quant_states, _read_quant_state)),
}
"""Name -> file name, parser."""
