"""Docstrings: functions start with an imperative, and no crutch stands in for a noun."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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


def unworded(paths):
    """List the functions whose docstring does not start with an imperative."""
    return [
        f"{path}:{node.lineno}: {text.splitlines()[0]}"
        for path in paths
        for node, text in functions(path)
        if not is_property(node) and (NOT_A_VERB.match(text) or not text[0].isupper())
    ]


def crutches(paths):
    """List the crutches in docstrings."""
    return [
        f"{path}:{line}: {match.group()!r}"
        for path in paths
        for line, text in strings(path)
        if (match := CRUTCHES.search(text))
    ]


def test_docstrings_of_functions_start_with_an_imperative():
    assert not unworded(FILES)


def test_no_crutch_stands_in_a_docstring():
    assert not crutches(FILES)


def test_the_scan_sees_an_offender(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        'def size():\n    """What it takes."""\n\n\nWIDTH = 1\n"""Width.\n\nArgs:\n    x: Of the result."""\n'
    )
    assert "What it takes" in unworded([file])[0]
    assert "Of" in crutches([file])[0]
