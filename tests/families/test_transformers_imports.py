"""The files of families that a new version of transformers touches."""

import ast
from pathlib import Path

import pytest

import vlmbuild.families

ROOT = Path(vlmbuild.families.__file__).parent


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_of_models_and_private_names_are_imported_in_two_files_of_a_family(path):
    if path.parent != ROOT and path.name in ("model.py", "processor.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        if any(module.split(".")[0] == "transformers" for module in modules):
            assert not [module for module in modules if module.startswith("transformers.models")]
            assert not [name for name in names if name.startswith("_")]
