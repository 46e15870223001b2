"""The vision prologue in a model gives what the host's gives."""

import matrix
import numpy as np
import onnxruntime
import pytest
import tiny
import torch

from vlmbuild.targets.onnx.graph_builder import GraphBuilder
from vlmbuild.targets.onnx.prologue import add_prologue

RANKS = {"pixel_values": 2, "vision_position_ids": 2, "vision_cu_seqlens": 1}
DTYPES = {"pixel_values": torch.float32, "vision_position_ids": torch.int64, "vision_cu_seqlens": torch.int32}


def session(family, config):
    builder = GraphBuilder(torch.float32)
    for name, value in add_prologue(builder, family.client_vision(config)).items():
        builder.give_output(f"{name}_out", value, DTYPES[name], [None] * RANKS[name])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = builder.model("prologue").SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def check(opened, family, config, batch):
    """Patches, positions and bounds; the host repeats the last bound, and adds a second feature to a single one."""
    host = family.prepare(batch, config).tensors
    feed = {name: tensor.numpy() for name, tensor in family.client_batch(batch).items()}
    found = {
        output.name.removesuffix("_out"): torch.from_numpy(value)
        for output, value in zip(opened.get_outputs(), opened.run(None, feed), strict=True)
    }
    count = len(found["pixel_values"])
    assert found["pixel_values"].equal(host["pixel_values"][:count])
    if len(found) == 1:
        return
    assert found["vision_position_ids"].equal(host["vision_position_ids"][:count])
    bounds = found["vision_cu_seqlens"]
    assert bounds.equal(host["vision_cu_seqlens"][: len(bounds)])
    assert int(bounds[-1]) == count


@pytest.fixture(scope="module")
def qwen(config):
    return session(tiny.FAMILY, config)


@pytest.mark.parametrize("name", [name for name in tiny.BATCHES if "text" not in name])
def test_grids(name, qwen, config):
    batch, _ = tiny.make_batch(*tiny.BATCHES[name])
    check(qwen, tiny.FAMILY, config, batch)


@pytest.fixture(scope="module", params=["pixtral", "mistral3"])
def padded(request):
    """Family, config, and the side in pixels of a feature."""
    setup = matrix.tiny(request.param)
    config = setup.config()
    return setup.family, config, config.vision_config.patch_size * setup.family.patch_layout(config)[1]


@pytest.mark.parametrize("sizes", [[(5, 3)], [(1, 1)], [(10, 2), (2, 6), (4, 4)]])
def test_padded_images(sizes, padded):
    family, config, side = padded
    token = config.image_token_id
    rows = [[token] * columns + [2] for count, columns in sizes for _ in range(count)]  # each ends with a break
    ids = torch.tensor([[1, *(token for row in rows for token in row)]])
    pixels = torch.randn(len(sizes), 3, side * max(h for h, _ in sizes), side * max(w for _, w in sizes))
    batch = {"input_ids": ids, "pixel_values": pixels, "image_sizes": side * torch.tensor(sizes)}
    check(session(family, config), family, config, batch)


def test_without_sizes_images_are_whole(padded):
    family, config, side = padded
    opened = session(family, config)
    pixels = np.random.default_rng(0).standard_normal((2, 3, 2 * side, 3 * side)).astype(np.float32)
    whole = np.array([[2 * side, 3 * side]] * 2)
    assert [entry.name for entry in opened.get_inputs()] == ["pixel_values"]
    for one, other in zip(
        opened.run(None, {"pixel_values": pixels}),
        opened.run(None, {"pixel_values": pixels, "image_sizes": whole}),
        strict=True,
    ):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_padded_tiles(name):
    setup = matrix.tiny(name)
    batch, _ = matrix.batch(setup, *matrix.conversations(setup)["counts differ, left"])
    opened = session(setup.family, setup.config())
    check(opened, setup.family, setup.config(), batch)
    del batch["pixel_attention_mask"]
    check(opened, setup.family, setup.config(), batch)
