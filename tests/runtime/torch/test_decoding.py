"""Static caches beside dynamic ones, and compiled decoding: as many graphs as there are regions, whatever the step."""

from __future__ import annotations

import matrix
import pytest
import torch
from parity import relative
from tiny import make_batch
from torch._dynamo.testing import CompileCounterWithBackend

from vlmbuild.errors import UsageError

OPTIONS = {
    "max_new_tokens": 6,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}
SAME = 1e-5  # relative, float32: sums over masked keys too


@pytest.fixture(scope="module", params=matrix.kinds())
def setup(request):
    return matrix.tiny(request.param)


@pytest.fixture(scope="module")
def model(setup):
    return matrix.bind(setup, matrix.program(setup), matrix.reference(setup)).eval()


@pytest.fixture(scope="module")
def batches(setup):
    said = matrix.conversations(setup)
    return {
        name: matrix.batch(setup, said[name][0], "left")[0]
        for name in ("several sizes", "counts differ, left", "text only")
    }


def assert_same(one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert max(relative(a, b) for a, b in zip(one.logits, other.logits, strict=True)) <= SAME


@pytest.mark.parametrize(("case", "options"), [("counts differ, left", {}), ("text only", {"num_beams": 3})])
def test_static_equals_dynamic(case, options, batches, model):
    found = [
        model.generate(**batches[case], **OPTIONS | options, cache_implementation=form) for form in ("static", None)
    ]
    assert_same(*found)
    assert found[0].past_key_values.length % 64 == 0 and found[1].past_key_values.length is None


def test_several_tokens_go_into_buffers_too(batches, model):
    """Several tokens at once, as assisted decoding passes them, and a crop of the rejected ones."""
    batch, logits = batches["several sizes"], []
    more = torch.arange(2, 8)[None]
    for length in (None, 512):
        cache = model.new_cache(length)
        model(**batch, past_key_values=cache)
        model(input_ids=more, past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == batch["input_ids"].shape[1] + 2
        logits.append(model(input_ids=more[:, 2:3], past_key_values=cache).logits)
    assert relative(*logits) <= SAME


def test_a_full_static_cache_is_said(batches, model):
    batch = batches["text only"]
    cache = model.new_cache(batch["input_ids"].shape[1])
    model(**batch, past_key_values=cache)
    with pytest.raises(UsageError, match="static cache has room for"):
        model(input_ids=torch.ones(2, 1).long(), past_key_values=cache)
    with pytest.raises(UsageError, match="static cache has room for"):
        model(**batch, past_key_values=model.new_cache(3))
    with pytest.raises(UsageError, match=r"past_key_values or labels"):
        model(**batch, labels=batch["input_ids"], past_key_values=cache)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("mllama", "static"), ("qwen2_vl", None)])
def test_no_step_compiles_again(name, form):
    setup = matrix.tiny(name)
    model = matrix.bind(setup, matrix.program(setup), matrix.reference(setup)).eval()
    batch, _ = matrix.batch(setup, matrix.conversations(setup)["several sizes"][0], "left")
    options = OPTIONS | {"cache_implementation": form}
    plain = model.generate(**batch, **options)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter)
    first = model.generate(**batch, **options | {"max_new_tokens": 3})
    graphs = counter.frame_count
    assert 0 < graphs <= 2 * len({*model.program.regions, *model.cached("dynamic").program.regions})
    assert_same(model.generate(**batch, **options), plain)
    assert counter.frame_count == graphs
    assert torch.equal(first.sequences, plain.sequences[:, : first.sequences.shape[1]])
    torch._dynamo.reset()


def test_moving_the_model_to_another_dtype_derives_cached_programs_again(bind, built):
    batch, _ = make_batch([[5, (1, 4, 6), 7]])
    model = bind(built).eval()
    expected = model.generate(**batch, **OPTIONS)
    found = model.to(torch.bfloat16).generate(**batch, **OPTIONS)
    assert found.past_key_values.blocks[0].keys.dtype == torch.bfloat16
    assert relative(found.logits[0].float(), expected.logits[0]) < 0.05
