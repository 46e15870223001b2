"""The shape of the code: which way imports point, where family names may stand, what the wheel holds."""

from __future__ import annotations

import ast
import graphlib
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

# A folder imports only itself and folders that stand before it.
ORDER = [
    "errors",
    "util",
    "artifact",
    "formats",
    "ops",
    "ir",
    "quant",
    "recipe",
    "zoo",
    "families",
    "adapters",
    "kv_cache",
    "runtime",
    "checkpoint",
    "rewrite",
    "capture",
    "passes",
    "measure",
    "golden",
    "engines",
    "targets",
    "builder",
    "train",
    "planner",
    "locks",
    "report",
    "compat",
    "demo",
    "cli",
    "__main__",
    "__init__",
]
FAMILY_NAME = re.compile(r"qwen|mllama|pixtral|llava|idefics|smolvlm", re.IGNORECASE)


def modules():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            yield name.removesuffix(".__init__"), path


def folder(name):
    """Return the folder of a module: vlmbuild.ir.dims -> ir; vlmbuild -> __init__."""
    return (*name.split("."), "__init__")[1]


def imports(path, known=()):
    """Yield the names that a file imports; members of packages in `known` by their own name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            members = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (member if member in known else node.module or "" for member in members)


MODULES = dict(modules())


def test_imports_point_one_way():
    wrong = []
    for name, path in MODULES.items():
        for other in imports(path):
            own = other.split(".")[0] in ("passes", "targets")
            back = other.startswith("vlmbuild.") and ORDER.index(folder(other)) > ORDER.index(folder(name))
            wrong += [f"{name} imports {other}"] if own or (back and name != "vlmbuild") else []
    assert not wrong


def test_other_folders_beside_the_package_are_not_imported_through_it():
    """A checkout puts its root on `vlmbuild.__path__`, for `passes/` and `targets/`; the rest would be a second copy."""
    beside = {"vlmbuild.vlmbuild", "vlmbuild.tests", "vlmbuild.artifacts"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
        for other in imports(path, beside)
        if ".".join(other.split(".")[:2]) in beside
    ]
    assert not wrong


def test_no_circle_of_modules():
    """Imports inside functions and for type checkers count too."""
    graph = {
        name: {other for other in imports(path, MODULES) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_onnx_runtime_is_imported_where_it_is_used():
    """It has hundreds of megabytes, and one target needs it."""
    imported = (
        (name, alias.name)
        for name, path in MODULES.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import)
        for alias in node.names
    )
    assert not [name for name, module in imported if module.split(".")[0] == "onnxruntime"]


def test_family_names_stay_in_families():
    allowed = ("families", "zoo", "demo", "cli", "__init__")  # the packaged checkpoints, and examples in help texts
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for name, path in MODULES.items()
        if folder(name) not in allowed
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if FAMILY_NAME.search(line) and "arXiv" not in line
    ]
    assert not wrong


def test_modules_have_a_docstring_and_a_readable_size():
    texts = {name: path.read_text() for name, path in MODULES.items()}
    assert not [name for name, text in texts.items() if not ast.get_docstring(ast.parse(text))]
    assert not [name for name, text in texts.items() if len(text.splitlines()) > 320]


def test_packages_listed_by_hand_are_the_tree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
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
