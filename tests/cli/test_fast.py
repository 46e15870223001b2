"""Commands that compute nothing start fast: they import neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlmbuild.cli import COMMANDS
from vlmbuild.locks.document import lock_files

LOCKS = lock_files(["artifacts/locks"])
SCRIPT = """
import sys
from vlmbuild.cli import main
code = main(sys.argv[1:])
print(code, sorted({"torch", "transformers"} & sys.modules.keys()), file=sys.stderr)
"""


def outcome(*arguments):
    """Exit code and slow modules that were imported."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, _, modules = done.stderr.splitlines()[-1].partition(" ")
    return int(code), modules


@pytest.mark.parametrize("arguments", [("--help",), *((name, "--help") for name in COMMANDS)], ids=" ".join)
def test_help(arguments):
    assert outcome(*arguments) == (0, "[]")


@pytest.mark.parametrize("options", [("verify",), ("inspect",), ("inspect", "--json")], ids=" ".join)
def test_commands_that_read_an_artifact(options, nf4):
    assert outcome(*options, nf4.path) == (0, "[]")


def test_diff_of_two_locks():
    assert outcome("diff", LOCKS[0], LOCKS[0]) == (0, "[]")
    assert outcome("diff", LOCKS[0], LOCKS[1]) == (6, "[]")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("build no-such-model -o out", 1),
        ("build no-such/model -o out", 1),
        ("plan no-such-model", 1),
        ("lock no-such-model -o x.lock", 1),
        ("diff no-such-model no-such-model", 1),
        ("check no-such.lock", 2),
        ("verify no-such-folder", 3),
        ("inspect no-such-folder", 3),
        ("run no-such-folder --prompt Hello", 3),
        ("build qwen2-vl-digits -o tests", 1),
        ("build qwen2-vl-digits -o out --quantize nf5", 2),
        ("build qwen2-vl-digits -o out --skip *", 2),
        ("build qwen2-vl-digits -o out --calibrate x.jsonl", 2),
        ("plan qwen2-vl-digits --batch 0", 2),
        ("teach", 2),
    ],
)
def test_mistakes(line, code, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert outcome(*line.split()) == (code, "[]")
