"""Qwen2.5-VL's windows and the time of its videos against transformers' own functions, and its refusals."""

from __future__ import annotations

import copy

import matrix
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import MODEL_FP32, assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from vlmbuild.errors import BatchError, SourceError
from vlmbuild.families import FAMILIES

FAMILY = FAMILIES["qwen2_5_vl"]
SIDES = st.integers(1, 10).map(lambda features: 2 * features)
GRIDS = st.lists(st.tuples(st.integers(1, 3), SIDES, SIDES), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def setup():
    return matrix.tiny("qwen2_5_vl")


def batch_of(grids, config, kind="image"):
    """One sample that has all images, or videos; the first value of a patch is its number."""
    token = getattr(config, f"{kind}_token_id")
    ids = [5]
    for t, h, w in grids:
        ids += [token] * (t * h * w // 4) + [6]
    pixels = torch.zeros(sum(t * h * w for t, h, w in grids), 1176)
    pixels[:, 0] = torch.arange(len(pixels))
    suffix = "_videos" if kind == "video" else ""
    return {
        "input_ids": torch.tensor([ids]),
        f"pixel_values{suffix}": pixels,
        f"{kind}_grid_thw": torch.tensor(grids),
    }


@settings(max_examples=60, deadline=None)
@given(grids=GRIDS)
def test_windows_equal_transformers(grids, setup):
    config = setup.config()
    prepared = FAMILY.prepare(batch_of(grids, config), config)
    tensors, whole = prepared.tensors, torch.tensor(grids)
    if int(whole.prod(1).sum()) == 4:  # an image that keeps a single feature from being a special case
        whole = whole.repeat(2, 1)
    order, windows = get_vision_window_index(whole, 2, 112, 14)
    rows = (4 * order[:, None] + torch.arange(4)).flatten()
    assert torch.equal(tensors["vision_position_ids"], get_vision_position_ids(whole, 2)[rows])
    for name, bounds in (("vision_window_cu_seqlens", windows), ("vision_cu_seqlens", get_vision_cu_seqlens(whole))):
        found = tensors[name]
        assert len(found) == len(windows) + 1  # equal lengths: all blocks are one graph
        assert torch.equal(found[: len(bounds)], bounds)
        assert (found[len(bounds) :] == bounds[-1]).all()
    index = tensors["feature_index"][tensors["feature_index"] >= 0]
    assert torch.equal(prepared.feature_order, order)
    assert torch.equal(order[index], torch.arange(len(index)))
    first = tensors["pixel_values"][:, 0].view(-1, 4)[index]  # the patches of each token's feature
    assert torch.equal(first.flatten(), torch.arange(4.0 * len(index)))


@pytest.mark.parametrize("full", [[], [2, 7]])
def test_blocks_are_one_region_whichever_attend_in_full(full, setup):
    values = copy.deepcopy(setup.values)
    values["vision_config"]["fullatt_block_indexes"] = full
    other = matrix.replace(setup, values=values)
    built, theirs = matrix.program(other), matrix.reference(other)
    blocks = [name for name, region in built.regions.items() if region.instances[0].startswith("model.visual.blocks")]
    assert blocks == ["visual.blocks"] and len(built.regions["visual.blocks"].instances) == 3
    inputs, _ = matrix.batch(other, *matrix.conversations(other)["several sizes"])
    with torch.no_grad():
        assert_close(matrix.bind(other, built, theirs)(**inputs).logits, theirs(**inputs).logits, MODEL_FP32)


def test_eight_sizes_compile_once(setup):
    config = setup.config()
    model = matrix.bind(setup, matrix.program(setup), matrix.reference(setup)).train()
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows, columns in ((4, 6), (2, 8), (20, 12), (2, 2), (16, 16), (18, 10), (6, 30), (8, 8)):
        batch = batch_of([(1, rows, columns), (1, columns, rows)], config)
        ids = batch["input_ids"]
        compiled(**batch, labels=ids.masked_fill(ids == config.image_token_id, -100)).loss.backward()
        graphs.add(counter.frame_count)
    assert graphs == {len({call.region for call in model.program.variants["image"].calls})}
    torch._dynamo.reset()


@pytest.mark.parametrize("seconds", [None, [0.5, 2.0], torch.tensor([1.3, 0.0])])
def test_the_time_of_videos_is_that_of_transformers(seconds, setup):
    config, theirs = setup.config(), matrix.reference(setup)
    batch = batch_of([(3, 4, 6), (2, 8, 4)], config, "video")
    times = {} if seconds is None else {"second_per_grid_ts": seconds}
    ids = batch["input_ids"]
    expected, _ = theirs.model.get_rope_index(
        ids, 2 * (ids == config.video_token_id).int(), None, batch["video_grid_thw"], **times
    )
    found = FAMILY.prepare({**batch, **times}, config).tensors["position_ids"]
    assert torch.equal(found, expected)
    if seconds is not None:
        assert not torch.equal(found, FAMILY.prepare(batch, config).tensors["position_ids"])


@pytest.mark.parametrize("seconds", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [1.0, -1.0], []])
def test_times_that_do_not_belong_to_the_videos_are_refused(seconds, setup):
    config = setup.config()
    batch = batch_of([(3, 4, 6), (2, 8, 4)], config, "video")
    with pytest.raises(BatchError, match="second_per_grid_ts .* 2 videos"):
        FAMILY.prepare({**batch, "second_per_grid_ts": torch.tensor(seconds)}, config)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"out_hidden_size": 64}, "out_hidden_size 64 must be .* 128"),
        ("vision_config", {"window_size": 27}, "window_size 27 .* 28 pixels"),
        ("vision_config", {"num_heads": 64}, "multiple of 4"),
        ("text_config", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window 0 must be a whole number"),
        ("text_config", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 3]}}, "mrope_section"),
    ],
)
def test_configs_that_would_be_captured_wrongly_are_refused(part, changes, message, setup):
    values = {**setup.values, part: setup.values[part] | changes}
    with pytest.raises(SourceError, match=message):
        FAMILY.config(values)
