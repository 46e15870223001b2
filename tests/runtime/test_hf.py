"""Private hooks of transformers live in runtime/hf.py alone, and every one of them still has a caller there."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import transformers
from transformers import GenerationMixin

import vlmbuild.runtime
from vlmbuild.runtime import hf

FOLDER = Path(vlmbuild.runtime.__file__).parent
MODULES = [path for path in sorted(FOLDER.rglob("*.py")) if path.name != "hf.py"]
HOOKS = {name for kind in (hf.Model, hf.TrainerHooks) for name in vars(kind) if not name.startswith("__")}
PUBLIC = {"device", "dtype", "new_cache", "can_generate", "main_input_name", "__call__"}
EXPORTS = set(dir(transformers))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_other_modules_use_public_names_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
            if node.module == "transformers":
                assert {alias.name for alias in node.names} <= EXPORTS
        for module in modules:
            assert not module.startswith(("transformers.", "accelerate", "peft", "trl")), module
        if isinstance(node, ast.FunctionDef):
            assert node.name not in HOOKS - PUBLIC, node.name
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"_is_user_defined", *(name for name in HOOKS if name.startswith("_"))}, node.attr


def test_generation_still_has_the_overridden_methods():
    own = {name for name, value in vars(hf.Model).items() if inspect.isfunction(value)} - PUBLIC
    assert len(own) == 5
    source = inspect.getsource(GenerationMixin)
    assert {name for name in own if f"self.{name}(" not in source} == set()
