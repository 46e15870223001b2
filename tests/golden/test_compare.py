"""Comparing: orders that are the engine's own, ties, shapes, and what an engine does not show."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlmbuild.golden import tolerances
from vlmbuild.golden.cases import packaged_cases
from vlmbuild.golden.compare import Answer, Limits, compare, first_difference
from vlmbuild.golden.record import GoldenRecord
from vlmbuild.golden.sample import difference, sample
from vlmbuild.golden.stages import stage_key

VALUES = np.random.default_rng(0).normal(size=(40, 96)).astype(np.float32)
LIMITS = Limits(1e-3, 1e-3)


def record(**changes):
    stages = ("pixels", "patches", "features", "embeddings", "hidden.0", "hidden.10", "logits")
    samples = {stage: sample(stage, VALUES) for stage in stages}
    fields = {"greedy": [5, 6, 7], "margins": [1.0, 1e-4, 1.0], "top": {5: -0.1, 6: -3.0}, **changes}
    return GoldenRecord(packaged_cases()[3], "text", [1, 2, 3], samples, {}, **fields)


def first(**answer):
    return first_difference(compare([record()], [Answer(**answer)], LIMITS))


def test_stages_are_in_the_order_of_computation():
    stages = ["greedy", "hidden.10", "logits", "hidden.2", "tokens", "features", "pixels", "embeddings", "patches"]
    ordered = ["tokens", "pixels", "patches", "features", "embeddings", "hidden.2", "hidden.10", "logits", "greedy"]
    assert sorted(stages, key=stage_key) == ordered


@pytest.mark.parametrize("stage", ["patches", "features"])
def test_rows_of_towers_may_be_in_any_order(stage):
    assert difference(sample(stage, VALUES[::-1]), sample(stage, VALUES)) < 1e-6
    assert difference(sample(stage, VALUES + 0.1), sample(stage, VALUES)) > 1e-2


def test_rows_of_tokens_have_their_places():
    assert difference(sample("hidden.0", VALUES[::-1]), sample("hidden.0", VALUES)) > 1


def test_the_worst_row_counts():
    spoiled = VALUES.copy()
    spoiled[-1] *= 1.5
    assert difference(sample("hidden.0", spoiled), sample("hidden.0", VALUES)) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [VALUES[:-1], np.full_like(VALUES, np.nan)])
def test_another_shape_and_no_number_are_no_agreement(value):
    assert difference(sample("hidden.0", value), sample("hidden.0", VALUES)) == math.inf


def test_the_first_stage_is_named():
    wrong = VALUES * 1.1
    found = first(tokens=[1, 2, 3], values={"logits": wrong, "hidden.10": wrong, "hidden.0": VALUES})
    assert (found.stage, found.case) == ("hidden.10", "text")
    assert found.error == pytest.approx(0.1, rel=1e-3)


def test_tokens_come_first_and_say_which():
    found = first(tokens=[1, 9, 3], values={"hidden.0": VALUES * 2})
    assert (found.stage, found.note) == ("tokens", "token 1 is 9, not 2")
    assert "2 tokens, not 3" in first(tokens=[1, 2]).note


def test_what_is_not_shown_is_not_judged():
    assert first() is None
    assert first(values={"embeddings": VALUES}) is None


def test_pixels_that_are_not_shown_widen_later_tolerances():
    near = VALUES * (1 + tolerances.UNSEEN_PIXELS / 2)
    assert first(values={"embeddings": near}) is None
    assert first(values={"pixels": VALUES, "embeddings": near}).stage == "embeddings"
    assert first(values={"pixels": near, "embeddings": near}).stage == "embeddings"


def test_a_tie_may_be_broken_either_way():
    assert first(greedy=[5, 9, 9]) is None
    assert first(greedy=[9, 6, 7]).stage == "greedy"
    assert first(greedy=[5, 6]).stage == "greedy"


def test_log_probabilities_take_the_place_of_logits():
    assert first(log_probabilities={5: -0.1005, 8: -9.0}) is None
    assert first(log_probabilities={5: -0.5}).stage == "logits"
    assert first(log_probabilities={8: -0.5}).error == math.inf


def test_an_engine_that_gives_up_says_where():
    found = first(tokens=[1, 2, 3], failed=("greedy", "out of memory"))
    assert (found.stage, found.note) == ("greedy", "out of memory")
