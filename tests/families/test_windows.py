"""Sliding windows of text, against transformers in float64: windows that end within images and texts, and caches longer than them."""

from __future__ import annotations

import copy

import matrix
import pytest
import torch
from parity import MODEL_FP32, relative

from vlmbuild.errors import BatchError
from vlmbuild.families.batch import block_lookahead
from vlmbuild.ir.cost import attention_window
from vlmbuild.ops import ATTENTION

WINDOW = 21
"""Less than an image has tokens, and less than a text has."""
LAST = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
CHANGES = {
    "pixtral": {"sliding_window": WINDOW},
    "mistral3": {"sliding_window": WINDOW},
    "qwen2_vl": LAST,
    "qwen2_5_vl": LAST,
}
"""Family -> fields of the text's config: all layers have the window, or those from the second on."""


@pytest.fixture(scope="module", params=CHANGES)
def setup(request):
    found = matrix.tiny(request.param)
    values = copy.deepcopy(found.values) | {"tie_word_embeddings": False}
    values["text_config"] |= CHANGES[request.param]
    return matrix.replace(found, values=values)


@pytest.fixture(scope="module")
def theirs(setup):
    return matrix.reference(setup)


@pytest.fixture(scope="module")
def program(setup):
    return matrix.program(setup)


@pytest.fixture(scope="module")
def ours(setup, program, theirs):
    return matrix.bind(setup, program, theirs)


@pytest.fixture(scope="module")
def batches(setup):
    said = matrix.conversations(setup)
    return {name: matrix.batch(setup, *said[name]) for name in ("counts differ, left", "counts differ, right")}


def test_layers_have_the_windows_of_the_config(setup, program):
    windows = {}
    for region in program.regions.values():
        if region.name.startswith("language_model.layers"):
            (node,) = (node for node in region.graph.graph.nodes if node.target in ATTENTION)
            windows |= {int(name.rpartition(".")[2]): attention_window(node) for name in region.instances}
    first = setup.values["text_config"].get("max_window_layers", 0)
    assert windows == {number: None if number < first else WINDOW for number in range(len(windows))}


def test_logits_loss_and_every_gradient_equal_transformers(batches, ours, theirs):
    for case, (inputs, labels) in batches.items():
        assert inputs["attention_mask"].sum(1).min() > WINDOW // 2
        found = matrix.errors(ours, theirs, inputs, labels)
        for what in ("logits", "loss", "gradient"):
            assert found[what] <= MODEL_FP32, (case, what, found)


@pytest.mark.parametrize("form", [None, "static"])
def test_tokens_and_logits_of_generation_equal_transformers(form, batches, ours, theirs):
    inputs, _ = batches["counts differ, left"]
    length = inputs["input_ids"].shape[1]
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "no_repeat_ngram_size": 2,
        "pad_token_id": 0,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
        "suppress_tokens": [*ours.family.placeholders(ours.config)],
    }
    found = ours.eval().generate(**inputs, **options, cache_implementation=form)
    expected = theirs.eval().generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences) and found.sequences.shape[1] == length + 8
    for step, (one, other) in enumerate(zip(found.logits, expected.logits, strict=True)):
        assert relative(one, other) <= MODEL_FP32, step


def test_several_tokens_at_once_see_their_windows(batches, ours):
    """Tokens that go into the cache one by one, and all at once, as assisted decoding passes them."""
    inputs, _ = batches["counts differ, left"]
    more = torch.arange(2, 9).expand(len(inputs["input_ids"]), -1)
    mask = inputs["attention_mask"]
    logits = []
    with torch.no_grad():
        for count in (1, 7):
            cache = ours.eval().new_cache(None)
            ours(**inputs, past_key_values=cache)
            for first in range(0, 7, count):
                shown = torch.nn.functional.pad(mask, (0, first + count), value=1)
                last = ours(input_ids=more[:, first : first + count], attention_mask=shown, past_key_values=cache)
            logits.append(last.logits[:, -1])
    assert relative(*logits) <= MODEL_FP32


def test_gaps_in_a_sample_are_refused(setup, batches):
    inputs, _ = batches["counts differ, left"]
    mask = inputs["attention_mask"].clone()
    mask[2, -3] = 0
    with pytest.raises(BatchError, match=rf"Sample 2: attention_mask .* windows of {WINDOW} tokens"):
        setup.family.prepare({**inputs, "attention_mask": mask}, setup.config())


def test_lookahead_reaches_the_end_of_the_block():
    blocks = torch.tensor([-1, 0, 0, 0, 1, 1, -1, -1, 2])
    assert block_lookahead(blocks).tolist() == [0, 2, 1, 0, 1, 0, 0, 0, 0]
