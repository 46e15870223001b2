"""Docstrings: functions start with an imperative, and no crutch stands in for a noun."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("vlmbuild", "passes", "targets") for path in sorted((ROOT / folder).rglob("*.py"))]

# First words of a function's docstring that are no verbs.
NOT_A_VERB = re.compile(
    r"(?:An?|All|As|Axes|Boolean|Bytes|Each|Every|Everything|First|For|Gives|Gradients|Highest|How|In|Into|Itself|Its|Length|"
    r"Logits|Names|No|Of|One|Plain|Seeded|Sizes|Softmax|Strides|Tables|Told|That|The|Their|There|These|This|Those|To|True|Two|"
    r"Types|Values|Versions|What|When|Where|Whether|Which|Whose|Why|With|Zeros)\b"
)
CRUTCHES = re.compile(
    r"held against|\banew\b|\bmeanwhile\b|\bthose that\b|\bused up\b|what comes closest|[Rr]aises what|are not what|"
    r":\s(?:Of|To|Told|In which|As for|What for|What is asked)\b"
)
PROPERTIES = ("property", "cached_property")


def functions(path):
    """Yield (function, docstring) of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield node, text


def is_property(function):
    """Return whether a method is read like an attribute."""
    return any(ast.unparse(decorator).endswith(PROPERTIES) for decorator in function.decorator_list)


def strings(path):
    """Yield (line, text) of every string that is a statement: docstrings, and descriptions below assignments."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_of_functions_start_with_an_imperative(path):
    found = [
        f"{path}:{node.lineno}: {text.splitlines()[0]}"
        for node, text in functions(path)
        if not is_property(node) and (NOT_A_VERB.match(text) or not text[0].isupper())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_crutch_stands_in_a_docstring(path):
    found = [f"{path}:{line}: {match.group()!r}" for line, text in strings(path) if (match := CRUTCHES.search(text))]
    assert not found, "\n".join(found)


def test_the_scan_sees_an_offender(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        'def size():\n    """What it takes."""\n\n\nWIDTH = 1\n"""Width.\n\nArgs:\n    x: Of the result."""\n'
    )
    with pytest.raises(AssertionError, match="What it takes"):
        test_docstrings_of_functions_start_with_an_imperative(file)
    with pytest.raises(AssertionError, match="Of"):
        test_no_crutch_stands_in_a_docstring(file)
