"""Plugins are imported once their name is given, by installed entry points, and what they add is like our own."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import setups

import vlmbuild
from vlmbuild import recipe
from vlmbuild.families import FAMILIES, family_named
from vlmbuild.passes import EXTRA_PASSES
from vlmbuild.runtime.load import OPENERS
from vlmbuild.targets import TARGETS
from vlmbuild.util.child import INHERITED_PLUGINS, ChildProcess

_MODULE = """
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

from vlmbuild.builder.plugins import TargetPlugin
from vlmbuild.families import FAMILIES
from vlmbuild.recipe import TARGET_OPTIONS
from vlmbuild.rewrite.pass_manager import PassOutcome
from vlmbuild.runtime.load import OPENERS
from vlmbuild.targets import TARGETS


@dataclass(frozen=True)
class Renamed:
    name: ClassVar[str] = "renamed"
    exact: ClassVar[bool] = True

    def __call__(self, program):
        outcome = PassOutcome()
        for name, region in program.regions.items():
            nodes = [n for n in region.graph.graph.nodes if n.op == "call_function" and not n.meta.get("seen")]
            for node in nodes:
                node.meta["seen"] = True
        return outcome


@dataclass(frozen=True)
class Lossy(Renamed):
    name: ClassVar[str] = "lossy"
    exact: ClassVar[bool] = False


class Normalize(Renamed):
    name: ClassVar[str] = "normalize"


class Other(type(FAMILIES["qwen2_vl"])):
    name = "other"
    title = "Other"
    architectures = ("OtherForConditionalGeneration",)


renamed, lossy, normalize, other, taken = Renamed(), Lossy(), Normalize(), Other(), FAMILIES["qwen2_vl"]
copy = TargetPlugin(TARGET_OPTIONS["trainable"], TARGETS["trainable"], OPENERS["trainable"])
if __name__ == "__main__":
    print(sys.argv[1], "other" in FAMILIES)
"""
_ENTRIES = """
[vlmbuild.families]
other = toy_plugins:other
broken = toy_plugins_missing:other
qwen2_vl = toy_plugins:taken
[vlmbuild.passes]
renamed = toy_plugins:renamed
lossy = toy_plugins:lossy
normalize = toy_plugins:normalize
misnamed = toy_plugins:renamed
twice = toy_plugins:renamed
[vlmbuild.targets]
copy = toy_plugins:copy
twice = toy_plugins:copy
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a distribution of plugins for one test, and restore the tables after it."""
    (tmp_path / "toy_plugins.py").write_text(_MODULE)
    info = tmp_path / "toy_plugins-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugins\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(_ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    tables = (FAMILIES, EXTRA_PASSES, TARGETS, OPENERS, recipe.TARGET_OPTIONS)
    saved = [(table, dict(table)) for table in tables]
    tools, named = list(recipe.BUILD_TOOLS), list(INHERITED_PLUGINS)
    yield
    for table, content in saved:
        table.clear()
        table.update(content)
    recipe.BUILD_TOOLS[:] = tools
    INHERITED_PLUGINS[:] = named


@pytest.mark.usefixtures("installed")
def test_nothing_is_added_before_it_is_named():
    assert "other" not in FAMILIES
    with pytest.raises(vlmbuild.VlmbuildError, match="--plugin NAME"):
        family_named("other")
    vlmbuild.use_plugins("other")
    assert family_named("other").title == "Other"
    vlmbuild.use_plugins("other")  # again is no conflict


@pytest.mark.usefixtures("installed")
def test_child_processes_use_them_too(tmp_path):
    vlmbuild.use_plugins("other")
    with ChildProcess("toy_plugins", "argument", settings={"PYTHONPATH": str(tmp_path)}) as process:
        assert list(process.answers()) == ["argument True\n"], process.last_words()


@pytest.mark.usefixtures("installed")
def test_tests_of_every_family_take_one_of_a_plugin(monkeypatch):
    for table in ("FAMILIES", "SETUPS", "PROCESSORS"):
        monkeypatch.setattr(setups, table, dict(getattr(setups, table)))
    toy_plugins = importlib.import_module("toy_plugins")
    toy_plugins.FAMILY, toy_plugins.setup, toy_plugins.processor = toy_plugins.other, print, repr
    setups.add(toy_plugins)
    assert (setups.SETUPS["other"], setups.PROCESSORS["other"]) == (print, repr)
    assert family_named("other") is toy_plugins.other


@pytest.mark.usefixtures("installed")
def test_builds_run_a_pass_and_record_its_version(checkpoint, tmp_path):
    vlmbuild.use_plugins("renamed", "copy")
    manifest = vlmbuild.build(checkpoint, tmp_path / "out", vlmbuild.Recipe(target="copy", dtype="float32")).manifest
    assert [step["name"] for step in manifest.passes][-2:] == ["renamed", "swap_attention"]
    assert manifest.toolchain["toy-plugins"] == "1.2"
    model, _ = vlmbuild.load(tmp_path / "out")
    assert model.artifact_id == manifest.id


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("absent", "copy"),  # lists what is installed
        ("broken", "toy_plugins_missing"),
        ("misnamed", "of that name"),
        ("twice", "vlmbuild.passes"),
        ("qwen2_vl", "already"),
        ("normalize", "a pass of that name already"),
        ("lossy", "exact"),
    ],
)
def test_what_does_not_fit_is_refused(name, fact):
    before = dict(FAMILIES), dict(EXTRA_PASSES), list(recipe.BUILD_TOOLS)
    with pytest.raises(vlmbuild.VlmbuildError, match=fact):
        vlmbuild.use_plugins(name)
    assert before == (dict(FAMILIES), dict(EXTRA_PASSES), list(recipe.BUILD_TOOLS))


@pytest.mark.usefixtures("installed")
def test_commands_know_the_choices_of_a_plugin(checkpoint, tmp_path, run, monkeypatch):
    for module in ("vlmbuild.cli.build", "vlmbuild.cli.options"):  # a process imports them after its plugins
        monkeypatch.delitem(sys.modules, module, raising=False)
    code, out, _ = run("--plugin", "copy", "build", checkpoint, "-o", tmp_path / "out", "--target", "copy", "--json")
    assert code == 0
    assert json.loads(out)["target"] == "copy"
    code, _, err = run("--plugin", "absent", "build", checkpoint, "-o", tmp_path / "other")
    assert (code, "absent" in err) == (2, True)
