"""Generation with a key-value cache, against transformers' own generation on the same weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import matrix
import pytest
import torch
from adapters import fill_adapter
from parity import relative
from tiny import END, IMAGE, START, VIDEO, make_batch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vlmbuild import add_lora, load
from vlmbuild.adapters.select import adaptable_layers
from vlmbuild.errors import BatchError, UsageError

CASES = ("one image", "several sizes", "counts differ, left", "text only")
# Relative norm of a step's logits, float32; measured below 1e-6.
LOGITS = 1e-5
# Random weights would say one token for ever.
GREEDY = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 2, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=matrix.SETUPS)
def setup(request):
    """Heads of their own: a random tied one answers with the last token again."""
    found = matrix.tiny(request.param)
    return matrix.replace(found, values={**found.values, "tie_word_embeddings": False})


@pytest.fixture(scope="module")
def batches(setup):
    """Padded on the left, as generation needs it."""
    said = matrix.conversations(setup)
    return {name: matrix.batch(setup, said[name][0], "left")[0] for name in CASES}


@pytest.fixture(scope="module")
def theirs(setup):
    return never_saying_media(matrix.reference(setup).eval(), setup)


@pytest.fixture(scope="module")
def ours(setup, theirs):
    return never_saying_media(matrix.bind(setup, matrix.program(setup), theirs).eval(), setup)


def never_saying_media(model, setup):
    """Suppress media tokens, as trained models do: a sequence with tokens of missing images would be refused."""
    config = setup.config()
    size = config.text_config.vocab_size
    media = {config.image_token_id, getattr(config, "video_token_id", None), *setup.ids(setup.media).tolist()}
    model.generation_config.suppress_tokens = [token for token in media if token is not None and token < size] or None
    return model


def words(model, count):
    """Ids of text tokens."""
    media = model.generation_config.suppress_tokens or []
    return torch.tensor([token for token in range(2, model.vocabulary) if token not in media][:count])


def followed_by(more, batch, family):
    """Extend the batch with more text, which sees the images that its last token sees."""
    names = [name for name, row in family.input_layout.items() if row == "token" and name in batch]
    last = {name: batch[name][:, -1:].expand(-1, more.shape[1], *[-1] * (batch[name].ndim - 2)) for name in names}
    added = {"input_ids": more, "attention_mask": torch.ones_like(more)} | last
    return batch | {name: torch.cat([batch[name], tensor], 1) for name, tensor in added.items()}


def answers(batch, options, *models):
    found = []
    for model in models:
        torch.manual_seed(0)
        found.append(model.generate(**batch, **GREEDY | options))
    return found


def assert_same(one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert len(one.logits) == len(other.logits)
    assert max(relative(a, b) for a, b in zip(one.logits, other.logits, strict=True)) <= LOGITS


WITH_LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("case", CASES[1:])
def test_greedy_tokens_and_the_logits_of_every_step_equal_transformers(case, batches, ours, theirs):
    mine, reference = answers(batches[case], WITH_LOGITS, ours, theirs)
    assert len(mine.logits) == GREEDY["max_new_tokens"]
    assert_same(mine, reference)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "temperature": 1.3}],
    ids=["beams", "sampled answers"],
)
def test_beams_and_sampling_equal_transformers(options, batches, ours, theirs):
    mine, reference = answers(batches["counts differ, left"], options | {"max_new_tokens": 6}, ours, theirs)
    assert torch.equal(mine, reference)


@matrix.of_kinds
def test_there_is_a_cache_even_if_none_is_asked_for(batches, ours):
    batch, options = batches["one image"], GREEDY | {"max_new_tokens": 3, "return_dict_in_generate": True}
    found = [ours.generate(**batch, **options, use_cache=use) for use in (True, False)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert found[1].past_key_values.get_seq_length() == batch["input_ids"].shape[1] + 2


def test_images_must_matter(batches, ours):
    """Logits of text after an image depend on the image; otherwise these tests would prove little."""
    batch = dict(batches["one image"])
    first = ours.generate(**batch, **GREEDY | WITH_LOGITS)
    batch["pixel_values"] = -batch["pixel_values"]
    other = ours.generate(**batch, **GREEDY | WITH_LOGITS)
    assert min(relative(a, b) for a, b in zip(first.logits, other.logits, strict=True)) > 1e-3
    assert len(first.sequences[0, -12:].unique()) > 3


@pytest.fixture
def rows(ours, monkeypatch):
    """(region, rows) of every call of a block, with and without images."""
    seen = []
    for bound in [*ours.bound.values(), *ours.cached("dynamic").bound.values()]:
        if bound.region.instances != ("",):
            run = bound.run

            def counted(tensors, compiler, activations, training, run=run, name=bound.region.name):
                seen.append((name, activations[0].shape[-2]))
                return run(tensors, compiler, activations, training)

            monkeypatch.setattr(bound, "run", counted)
    return seen


@matrix.of_kinds
def test_a_step_computes_one_token_of_every_row(batches, ours, rows):
    batch = batches["counts differ, left"]
    ours.generate(**batch, **GREEDY | {"max_new_tokens": 1})
    prompt = len(rows)
    ours.generate(**batch, **GREEDY | {"max_new_tokens": 3})
    steps = rows[2 * prompt :]
    layers = ours.config.text_config.num_hidden_layers
    assert len(steps) == 2 * layers and {count for _, count in steps} == {len(batch["input_ids"])}
    assert not any(name.endswith(".images") or "vis" in name for name, _ in steps)


@matrix.of_kinds
def test_beams_run_the_prompt_once(batches, ours, rows):
    batch = batches["one image"]
    ours.generate(**batch, **GREEDY | {"max_new_tokens": 1})
    once = list(rows)
    rows.clear()
    ours.generate(**batch, **GREEDY | {"max_new_tokens": 1, "num_beams": 3})
    assert rows == once


@matrix.of_kinds
def test_the_head_reads_the_last_token_alone(batches, ours):
    batch = batches["one image"]
    logits = ours(**batch, past_key_values=ours.new_cache(), logits_to_keep=1).logits
    whole = ours(**batch).logits
    assert logits.shape == (1, 1, whole.shape[-1])
    assert relative(logits, whole[:, -1:]) <= LOGITS
    assert relative(ours(**batch, logits_to_keep=2).logits, whole[:, -2:]) <= LOGITS
    assert relative(ours(**batch, past_key_values=ours.new_cache()).logits, whole) <= LOGITS


@matrix.of_kinds
def test_an_answer_is_the_prompt_of_the_next_turn(batches, ours):
    """Several tokens at once on what a cache holds, padding among the new ones included, except with windows."""
    batch = batches["counts differ, left"]
    cache = ours.new_cache()
    ours(**batch, past_key_values=cache)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    more = words(ours, 6).expand(len(ids), -1)
    added = torch.ones(more.shape, dtype=torch.long)
    windowed = getattr(ours.config.get_text_config(), "sliding_window", None) is not None
    added[0, :2] = int(windowed)  # padding between tokens is refused with windows
    whole = followed_by(more, batch, ours.family) | {"attention_mask": torch.cat([mask, added], 1)}
    logits = ours(input_ids=more, attention_mask=whole["attention_mask"], past_key_values=cache).logits
    expected = ours(**whole).logits[:, -6:]
    assert relative(logits[added.bool()], expected[added.bool()]) <= LOGITS


def test_a_returned_cache_goes_on(batches, ours, theirs):
    batch = batches["one image"]
    (first,) = answers(batch, {"max_new_tokens": 8, "return_dict_in_generate": True}, ours)
    said = first.sequences[:, batch["input_ids"].shape[1] :]
    longer = followed_by(torch.cat([said, words(ours, 3)[None]], 1), batch, ours.family)
    going_on = ours.generate(**longer, **GREEDY | {"max_new_tokens": 8}, past_key_values=first.past_key_values)
    again = answers(longer, {"max_new_tokens": 8}, ours, theirs)
    assert torch.equal(going_on, again[0]) and torch.equal(going_on, again[1])


@matrix.of_kinds
def test_a_cache_does_not_go_on_with_other_images(batches, ours):
    (first,) = answers(batches["one image"], {"max_new_tokens": 2, "return_dict_in_generate": True}, ours)
    with pytest.raises(UsageError, match="other images"):
        ours.generate(**batches["several sizes"], **GREEDY, past_key_values=first.past_key_values)


@matrix.of_kinds
def test_assisted_decoding_equals_greedy(batches, ours):
    """Candidates from the prompt itself: many tokens in one step, and a cache that is cropped."""
    plain, assisted = (
        ours.generate(**batches["one image"], **GREEDY | options)
        for options in ({}, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1})
    )
    assert torch.equal(plain, assisted)


class Tokens(BaseStreamer):
    def __init__(self):
        self.found = []
        self.ended = False

    def put(self, value):
        self.found.append(value.flatten())

    def end(self):
        self.ended = True


class After(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@matrix.of_kinds
def test_streamers_and_stopping_criteria(batches, ours):
    batch = batches["one image"]
    streamer, length = Tokens(), batch["input_ids"].shape[1]
    criteria = StoppingCriteriaList([After(length + 5)])
    found = ours.generate(**batch, **GREEDY, streamer=streamer, stopping_criteria=criteria)
    assert found.shape == (1, length + 5)
    assert torch.equal(torch.cat(streamer.found), found[0]) and len(streamer.found) == 6 and streamer.ended


@matrix.of_kinds
def test_rows_that_have_ended_do_not_disturb_others(batches, ours, theirs):
    batch = batches["counts differ, left"]
    (free,) = answers(batch, {}, ours)
    end = int(free[0, batch["input_ids"].shape[1] + 3])
    assert torch.equal(*answers(batch, {"eos_token_id": end}, ours, theirs))


def assert_steps_are_those_of_the_whole_text(model, batch, **options):
    found = model.generate(**batch, **GREEDY | WITH_LOGITS | {"max_new_tokens": 3} | options)
    said = found.sequences[:, batch["input_ids"].shape[1] :]
    with torch.no_grad():
        whole = model(**followed_by(said, batch, model.family), logits_to_keep=4).logits
    for step, logits in enumerate(found.logits):
        assert relative(logits, whole[:, step]) <= LOGITS
    return found.logits[2]


@matrix.of_kinds
def test_an_adapter_and_its_dropout(batches, ours):
    """The cached program is derived again, with the adapter, and reads the weights as training has left them."""
    model = matrix.copied(ours)
    batch = batches["several sizes"]
    before = assert_steps_are_those_of_the_whole_text(model, batch)
    roles = {layer.role for layer in adaptable_layers(model.program)} - {"head"}  # Gemma 3's projector is a parameter
    add_lora(model, r=4, dropout=0.5, vision=True, target=sorted(roles))
    for std in (0.05, 0.1):
        fill_adapter(model, std)
        after = assert_steps_are_those_of_the_whole_text(model.eval(), batch)
        assert relative(after, before) > 1e-3
        before = after


@matrix.of_kinds
@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_autocast(form, batches, ours, theirs):
    """Keys and values have autocast's dtype, and another one where it ends."""
    batch, options = batches["several sizes"], GREEDY | WITH_LOGITS | {"max_new_tokens": 3}
    exact = theirs.generate(**batch, **options)
    with torch.autocast("cpu", torch.bfloat16):
        mine = ours.generate(**batch, **options, cache_implementation=form)
        reference = theirs.generate(**batch, **options)
        whole = ours(**batch).logits[:, -1]
    assert mine.past_key_values.blocks[0].keys.dtype == torch.bfloat16
    for logits in (mine.logits[0], whole):
        assert 0 < relative(logits, exact.logits[0]) <= 1.5 * relative(reference.logits[0], exact.logits[0])
    step = {"input_ids": words(ours, 1)[None], "past_key_values": mine.past_key_values}
    outside = ours(**step).logits
    mine.past_key_values.crop(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(ours(**step).logits, outside) < 0.05


@matrix.of_kinds
def test_the_first_generations_may_be_at_once(setup, theirs, batches):
    model = never_saying_media(matrix.bind(setup, matrix.program(setup), theirs).eval(), setup)
    batch, options = batches["text only"], GREEDY | {"max_new_tokens": 2}
    start = Barrier(3)

    def generate(form):
        start.wait()
        return model.generate(**batch, **options, cache_implementation=form)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(generate, [None, None, "static"]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_model_runs_while_another_thread_exports(ours, batches, monkeypatch):
    expected = ours(**batches["text only"]).logits
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert torch.equal(ours(**batches["text only"]).logits, expected)


def test_four_bit_weights(nf4):
    batch, _ = make_batch([[5, (1, 4, 6), 7]])
    exact, _ = load(nf4.path)
    options = {"suppress_tokens": [START, END, IMAGE, VIDEO]}
    assert_steps_are_those_of_the_whole_text(exact, batch, **options)
    half, _ = load(nf4.path, dtype="bfloat16")
    found, expected = (model.generate(**batch, **GREEDY | WITH_LOGITS | options) for model in (half, exact))
    assert relative(found.logits[0].float(), expected.logits[0]) < 0.05


@matrix.of_kinds
def test_what_is_no_cache_of_ours_is_refused(batches, ours):
    from transformers import DynamicCache

    batch = batches["text only"]
    with pytest.raises(UsageError, match="past_key_values is a DynamicCache"):
        ours.generate(**batch, **GREEDY, past_key_values=DynamicCache())
    with pytest.raises(UsageError, match="'quantized' is not supported"):
        ours.generate(**batch, **GREEDY, cache_implementation="quantized")


@matrix.of_kinds
def test_tokens_must_fit_the_cache(batches, ours):
    cache = ours.new_cache()
    ours(**batches["text only"], past_key_values=cache)
    with pytest.raises(BatchError, match="input_ids have 1 rows, but the cache has 2"):
        ours(input_ids=torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(BatchError, match="Sample 1 has token ids from 9999 to 9999"):
        ours(input_ids=torch.tensor([[5], [9999]]), past_key_values=cache)
    with pytest.raises(BatchError, match=r"attention_mask has shape \(2, 1\)"):
        ours(input_ids=torch.ones(2, 1).long(), attention_mask=torch.ones(2, 1), past_key_values=cache)


@matrix.of_kinds
def test_a_cache_goes_on_with_tokens_alone(setup, batches, ours):
    """Other inputs would be ignored, so they are refused."""
    cache, batch = ours.new_cache(), batches["several sizes"]
    ours(**batch, past_key_values=cache)
    step = {"input_ids": torch.ones(len(batch["input_ids"]), 1).long(), "past_key_values": cache}
    for name, value in {
        "pixel_values": batch["pixel_values"],
        "position_ids": step["input_ids"],
        "inputs_embeds": torch.ones(1),
    }.items():
        with pytest.raises(BatchError, match=f"{name} belongs to a prompt"):
            ours(**step, **{name: value})
    with pytest.raises(BatchError, match="no input_ids"):
        ours(attention_mask=batch["attention_mask"], past_key_values=cache)
    ours(**step, use_cache=True)
