"""Bisection names the pass that breaks parity, forward or backward, for every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch

from vlmbuild.builder.passes import exact_passes
from vlmbuild.builder.tracing import trace
from vlmbuild.cli import main
from vlmbuild.locks.sources import trace_source
from vlmbuild.measure import pass_parity as module
from vlmbuild.measure.pass_parity import pass_parity
from vlmbuild.passes import EXTRA_PASSES
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import PassOutcome

PASSES = exact_passes(Recipe())


def parity_of(traced, passes):
    return pass_parity(traced.program, traced.family, traced.config, passes)


@pytest.mark.parametrize("name", ["qwen2-vl-digits", "mllama-digits"])
def test_exact_passes_keep_values(name):
    parity = parity_of(trace_source(name), PASSES)
    assert [step.name for step in parity.steps] == ["normalize", "fuse_rope", "swap_attention"]
    assert parity.broken_by == ""
    assert parity.steps[-1].gradient > 0  # the order of summation did change, so something was compared


@dataclass(frozen=True)
class Break:
    """An "exact" pass that changes a constant, or the gradient alone."""

    kind: str
    name: ClassVar[str] = "break"
    exact: ClassVar[bool] = True

    def __call__(self, program):
        outcome = PassOutcome()
        region = program.regions["language_model.layers"]
        for node in region.graph.graph.nodes:
            if node.target is torch.ops.aten.silu.default:
                if self.kind == "forward":
                    node.target = torch.ops.aten.gelu.default
                else:
                    with region.graph.graph.inserting_before(node):
                        held = region.graph.graph.call_function(torch.ops.aten.detach.default, (node.args[0],))
                    node.args = (held,)
        outcome.add(region.name, 1)
        return outcome


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_the_pass_that_breaks_parity_is_named(kind):
    parity = parity_of(trace(tiny.config_values(layers=1, depth=1), "tiny"), [PASSES[0], Break(kind), PASSES[2]])
    assert parity.broken_by == "break"
    assert parity.steps[0].holds
    broken = parity.steps[1]
    assert (broken.forward > 1e-3) == (kind == "forward")
    assert broken.gradient > 1e-3


def test_the_command(tmp_path, capsys):
    path = tmp_path / "digits.lock"
    assert main(["lock", "pixtral-digits", "-o", str(path), "--attention", "triton", "--no-kernels"]) == 0
    assert main(["check", str(path), "--bisect", "--no-kernels"]) == 0
    assert "all equal" in capsys.readouterr().out


def test_a_lock_that_cannot_be_read_hides_no_broken_pass(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(EXTRA_PASSES, "break", Break("forward"))
    bad, good = tmp_path / "bad.lock", tmp_path / "good.lock"
    bad.write_text("<<<<<<< HEAD\n")
    assert main(["lock", "qwen2-vl-digits", "-o", str(good), "--no-kernels"]) == 0
    assert main(["check", str(bad), str(good), "--bisect", "--no-kernels"]) == 6
    assert "good.lock: the pass break " in capsys.readouterr().err


def test_a_model_that_is_too_large_is_refused(tmp_path, capsys, monkeypatch):
    path = tmp_path / "digits.lock"
    assert main(["lock", "qwen2-vl-digits", "-o", str(path), "--no-kernels"]) == 0
    monkeypatch.setattr(module, "_LARGEST_BYTES", 2**20)
    code = main(["check", str(path), "--bisect", "--no-kernels"])
    assert code == 6
    captured = capsys.readouterr()
    assert "Bisect with a smaller model of the family" in captured.out
    assert "no difference" in captured.out  # the rest of the report stands
    assert "parity" in captured.err


@pytest.mark.parametrize("spoiled", ["text logits", "a gradient"])
def test_a_value_that_is_not_a_number_is_no_parity(spoiled, monkeypatch):
    computed = module._values
    calls = []

    def spoil(*arguments):
        values = computed(*arguments)
        calls.append(values)
        if len(calls) == 2:
            part = values[spoiled == "a gradient"]
            name = next(key for key in part if "text" in key)
            part[name] = part[name] * float("nan")
        return values

    monkeypatch.setattr(module, "_values", spoil)
    parity = parity_of(trace(tiny.config_values(layers=1, depth=1), "tiny"), PASSES[:2])
    assert parity.broken_by == PASSES[0].name
