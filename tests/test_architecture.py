"""The shape of the code: which way imports point, where family names may stand, what the wheel holds."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"vlmbuild": "vlmbuild", "passes": "vlmbuild.passes", "targets": "vlmbuild.targets"}

# Each layer may import itself and the layers before it.
LAYERS = (
    ("errors", "checks", "unsloth_arguments", "collector", "cores", "devices", "weight_format"),
    ("quant_spec", "code_platform"),
    ("recipe",),
    ("artifact",),
    ("zoo",),
    ("program",),
    ("graph_text", "clean"),
    ("ops",),
    ("program_json", "divide", "quantization", "lora", "packed_weight"),
    ("shapes", "image_part"),
    ("cached_block",),
    ("code_index",),
    ("cached_program",),
    ("rewrite",),
    ("near_miss",),
    ("pipeline",),
    ("families",),
    ("conversation", "images"),
    ("responses",),
    ("collator",),
    ("packing",),
    ("source", "source_tensors", "source_values"),
    ("digests",),
    ("repeat",),
    ("capture",),
    ("outline",),
    ("runtime",),
    ("question",),
    ("sensitivity",),
    ("calibration",),
    ("merge",),
    ("merge_parity",),
    ("passes", "targets"),
    ("source_fit",),
    ("builder",),
    ("summary", "adapters", "artifact_cache", "gradient_audit", "training_log"),
    ("training_callback",),
    ("memory", "unsloth"),
    ("planner",),
    ("tracing", "region_cost", "formulas"),
    ("pass_parity",),
    ("locks", "pages"),
    ("pytest_locks",),
    ("report", "cli_options", "cli_output", "demo"),
    ("cli_locks", "cli_graphs", "cli_run", "cli_verify"),
    ("cli",),
    ("__main__", "__init__"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FAMILY_NAME = re.compile(r"qwen|mllama|pixtral|llava", re.IGNORECASE)


def modules():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            yield pytest.param(name.removesuffix(".__init__"), path, id=name)


def layer(name):
    """The part of a dotted name that decides its layer; the zoo's task, and the script that trains it, use all below."""
    if name.startswith(("vlmbuild.zoo.task", "vlmbuild.zoo.train")):
        return "demo"
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module or ""


MODULES = list(modules())


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_imports_point_one_way(name, path):
    for other in imports(path):
        assert other.split(".")[0] not in ("passes", "targets"), other
        if other.startswith("vlmbuild.") and name != "vlmbuild":
            assert RANK[layer(other)] <= RANK[layer(name)], f"{name} imports {other}"


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_loading_does_not_need_what_built(name, path):
    if layer(name) == "runtime":
        assert not {layer(other) for other in imports(path) if other.startswith("vlmbuild")} & {
            "passes", "targets", "builder", "capture", "outline", "pipeline", "rewrite", "source",
        }  # fmt: skip
    if layer(name) == "artifact":
        assert {layer(other) for other in imports(path) if other.startswith("vlmbuild")} <= {
            "errors", "weight_format", "artifact",
        }  # fmt: skip


def test_only_the_builder_imports_passes_and_targets():
    for parameter in MODULES:
        name, path = parameter.values
        if layer(name) not in ("passes", "targets", "builder"):
            assert not any(other.startswith(("vlmbuild.passes", "vlmbuild.targets")) for other in imports(path)), name


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_family_names_stay_in_families(name, path):
    if layer(name) in (
        "families",
        "zoo",
        "demo",
        "cli",
        "cli_locks",
        "cli_graphs",
        "cli_run",
        "cli_verify",
        "__init__",
    ):
        return  # families, the packaged checkpoint, and examples in help texts
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if FAMILY_NAME.search(line) and "arXiv" not in line:
            pytest.fail(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")


@pytest.mark.parametrize(("name", "path"), MODULES)
def test_modules_have_a_docstring_and_a_readable_size(name, path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= 320


def test_packages_listed_by_hand_are_the_tree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {".".join([package, *init.parent.relative_to(ROOT / folder).parts]) for folder, package in FOLDERS.items()
             for init in (ROOT / folder).rglob("__init__.py")}  # fmt: skip
    assert set(project["tool"]["setuptools"]["packages"]) == found


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="building a wheel needs setuptools")
def test_wheel_holds_the_tree(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        tmp_path,
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("vlmbuild-*.whl"))) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        "/".join([*package.split("."), *path.relative_to(source / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert found == expected


def test_top_level_is_fixed():
    allowed = {"vlmbuild", "passes", "targets", "tests", "artifacts"}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")} - {"build", "dist"}
    assert {name for name in folders if not name.endswith(".egg-info")} == allowed
