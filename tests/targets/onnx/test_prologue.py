"""The vision prologue in a model gives what the host's gives."""

import matrix
import numpy as np
import onnxruntime
import pytest
import tiny
import torch

from vlmbuild.targets.onnx.graph_builder import GraphBuilder
from vlmbuild.targets.onnx.prologue import add_prologue

RANKS = {"pixel_values": 2, "vision_position_ids": 2}
BOUNDS = ("vision_cu_seqlens", "vision_window_cu_seqlens")
DTYPES = {"pixel_values": torch.float32, **dict.fromkeys(BOUNDS, torch.int32)}


def session(family, config, ranks=RANKS):
    builder = GraphBuilder(torch.float32)
    for name, value in add_prologue(builder, family.client_vision(config)).items():
        builder.give_output(f"{name}_out", value, DTYPES.get(name, torch.int64), [None] * ranks.get(name, 1))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = builder.model("prologue").SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def check(opened, family, config, batch):
    """Patches, positions and bounds; the host repeats the last bound, and adds a second feature to a single one."""
    prepared = family.prepare(batch, config)
    host = prepared.tensors
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
    for name in found.keys() & set(BOUNDS):
        bounds = found[name]
        assert bounds.equal(host[name][: len(bounds)])
        assert int(bounds[-1]) == count
    if prepared.feature_order is not None:
        places = found["feature_order"]
        assert places[prepared.feature_order[: len(places)]].equal(torch.arange(len(places)))


@pytest.fixture(scope="module")
def qwen(config):
    return session(tiny.FAMILY, config)


@pytest.mark.parametrize("name", [name for name in tiny.BATCHES if "text" not in name])
def test_grids(name, qwen, config):
    batch, _ = tiny.make_batch(*tiny.BATCHES[name])
    check(qwen, tiny.FAMILY, config, batch)


@pytest.mark.parametrize("grids", [[(1, 2, 2)], [(1, 16, 8)], [(2, 6, 22), (1, 18, 8), (3, 2, 30), (1, 26, 10)]])
def test_windows(grids, windows):
    config = windows.config()
    counts = [t * h * w for t, h, w in grids]
    ids = torch.tensor([[token for count in counts for token in (5, *[config.image_token_id] * (count // 4))]])
    pixels = torch.arange(sum(counts) * 1176.0).view(-1, 1176)
    batch = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
    check(session(windows.family, config), windows.family, config, batch)


@pytest.fixture(scope="module")
def windows():
    return matrix.SETUPS["qwen2_5_vl"](False)


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


def test_squares():
    setup = matrix.tiny("gemma3")
    opened = session(setup.family, setup.config(), {"pixel_values": 2})
    for case in ("one image", "counts differ, left"):
        batch, _ = matrix.batch(setup, *matrix.conversations(setup)[case])
        check(opened, setup.family, setup.config(), batch)
