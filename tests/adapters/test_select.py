"""Which linear layers get an adapter: roles and parts come from the graph; whatever matches nothing is an error."""

from __future__ import annotations

import math

import pytest

from vlmbuild.adapters.lora import Lora, with_patterns
from vlmbuild.adapters.select import Targets, adaptable_layers, choose
from vlmbuild.errors import UsageError
from vlmbuild.train.lora import add_lora

LORA = Lora(4, 8.0)


def names(program, **targets):
    return [module.removeprefix("model.") for module in choose(program, Targets(**targets), LORA)]


def leaves(modules):
    return {module.rpartition(".")[2] for module in modules}


def test_all_linear_is_the_language_model_and_the_tower_on_request(built):
    language = names(built)
    assert len(language) == 3 * 7 and all(name.startswith("language_model.") for name in language)
    both = names(built, vision=True)
    assert len(both) == 3 * 7 + 2 * 4
    assert names(built, vision=True, language=False) == [name for name in both if name.startswith("visual.")]


def test_parts_and_layers(built):
    assert leaves(names(built, mlp=False)) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert leaves(names(built, attention=False, vision=True)) == {"gate_proj", "up_proj", "down_proj", "fc1", "fc2"}
    assert {name.split(".")[2] for name in names(built, layers=[0, 2])} == {"0", "2"}


def test_roles_names_and_patterns(built):
    assert leaves(names(built, target=["q_proj", "v_proj"])) == {"q_proj", "v_proj"}
    assert len(names(built, target="*.layers.1.*")) == 7
    assert names(built, target=("projector", "*.layers.0.mlp.up_proj")) == [
        "visual.merger.mlp.0",
        "visual.merger.mlp.2",
        "language_model.layers.0.mlp.up_proj",
    ]
    assert len(names(built, target="vision")) == 2 * 4


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"target": "q_porj"}, "'q_porj' matches no linear layer.*model.visual"),
        ({"target": ()}, "target names nothing"),
        ({"target": ["q_proj", "head"]}, "shares its weight"),
        ({"target": "fc1"}, r"'fc1' matches 2 linear layers \(vision/mlp\), and all are excluded by vision=False"),
        ({"attention": False, "mlp": False}, "'all-linear' matches .* attention=False, mlp=False"),
        ({"language": False}, "all are excluded by vision=False, language=False"),
        ({"layers": [0, 7]}, "there is no layer 7"),
        ({"layers": []}, r"excluded by .*layers=\[\]"),
    ],
)
def test_nothing_matched_is_an_error_that_says_why(built, targets, message):
    with pytest.raises(UsageError, match=message):
        choose(built, Targets(**targets), LORA)


def test_scaling():
    assert Lora(4, 8.0).scaling == 2.0
    assert Lora(4, 8.0, rslora=True).scaling == pytest.approx(8 / math.sqrt(4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1.0), "at least 1"),
        ((2.5, 1.0), "whole number"),
        ((True, 1.0), "whole number"),
        ((2, math.nan), "alpha"),
        ((2, 1.0, 1.0), "below 1"),
        ((2, 1.0, -0.1), "from 0"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(UsageError, match=message):
        Lora(*values)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"target": None}, "target must be 'all-linear'"),
        ({"layers": 1}, "layers must be a list"),
        ({"layers": "01"}, "list"),
    ],
)
def test_bad_targets(targets, message):
    with pytest.raises(UsageError, match=message):
        Targets(**targets)


def test_parts_are_the_same_with_adapters(model):
    before = {layer.module: layer.part for layer in adaptable_layers(model.program)}
    add_lora(model, r=2, vision=True)
    assert {layer.module: layer.part for layer in adaptable_layers(model.program)} == before


def test_patterns_of_ranks_and_alphas():
    ranks, alphas = {"q_proj": 2}, {r"layers\.(0|7)\.q_proj": 1}  # PEFT's are regular expressions
    assert with_patterns(LORA, "model.layers.0.q_proj", ranks, alphas) == Lora(2, 1.0)
    assert with_patterns(LORA, "model.layers.1.q_proj", ranks, alphas) == Lora(2, 8.0)
    assert with_patterns(LORA, "model.layers.1.v_proj", ranks, alphas) == LORA
