"""Commands that compute nothing start fast: they import neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys

from vlmbuild.cli import COMMANDS
from vlmbuild.locks.document import lock_files

LOCKS = lock_files(["artifacts/locks"])
SCRIPT = """
import json, sys
from vlmbuild.cli import main
for line in json.loads(sys.argv[1]):
    code = main(line)
    print("outcome", code, sorted({"torch", "transformers"} & sys.modules.keys()), file=sys.stderr, flush=True)
"""


def outcomes(*lines):
    """Exit code of each command line, run one after the other, and the slow modules that are imported by then."""
    arguments = json.dumps([[str(argument) for argument in line] for line in lines])
    done = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, check=True)
    found = [line.split(" ", 2)[1:] for line in done.stderr.splitlines() if line.startswith("outcome ")]
    return [(int(code), modules) for code, modules in found]


def test_commands_that_compute_nothing(nf4):
    lines = {
        ("--help",): 0,
        **{(name, "--help"): 0 for name in COMMANDS},
        **{(*options, nf4.path): 0 for options in (("verify",), ("inspect",), ("inspect", "--json"))},
        ("diff", LOCKS[0], LOCKS[0]): 0,
        ("diff", LOCKS[0], LOCKS[1]): 6,
    }
    assert dict(zip(lines, outcomes(*lines), strict=True)) == {line: (code, "[]") for line, code in lines.items()}


def test_mistakes(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = {
        "build no-such-model -o out": 1,
        "build no-such/model -o out": 1,
        "plan no-such-model": 1,
        "lock no-such-model -o x.lock": 1,
        "diff no-such-model no-such-model": 1,
        "check no-such.lock": 2,
        "verify no-such-folder": 3,
        "inspect no-such-folder": 3,
        "run no-such-folder --prompt Hello": 3,
        "build qwen2-vl-digits -o tests": 1,
        "build qwen2-vl-digits -o out --quantize nf5": 2,
        "build qwen2-vl-digits -o out --skip *": 2,
        "build qwen2-vl-digits -o out --calibrate x.jsonl": 2,
        "build qwen2-vl-digits -o out --adapter no-such-folder": 2,
        "build tests -o out": 1,
        "plan qwen2-vl-digits --image missing.png": 2,
        "lock qwen2-vl-digits -o tests": 1,
        "plan qwen2-vl-digits --batch 0": 2,
        "teach": 2,
    }
    found = outcomes(*(line.split() for line in expected))
    assert dict(zip(expected, found, strict=True)) == {line: (code, "[]") for line, code in expected.items()}


def test_the_first_stage_is_shown_before_torch_is_imported():
    script = (
        "import sys; from vlmbuild.cli.output import StageProgress\n"
        "StageProgress().__enter__(); sys.stderr.write(str('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["start", "False"]
