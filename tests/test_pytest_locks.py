"""The pytest plugin, in test suites of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SUITE = """
from vlmbuild import Recipe

def test_graph(graph_lock):
    graph_lock("digits", Recipe(attention="sdpa"{options}), source="qwen2-vl-digits", kernels=False)
"""


@pytest.fixture
def suite(tmp_path):
    def suite(*arguments, options=""):
        (tmp_path / "test_graphs.py").write_text(SUITE.format(options=options))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "test_graphs.py"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    return suite


def test_a_lock_is_written_held_and_broken(suite, tmp_path):
    code, out = suite()
    assert code == 1
    assert "does not exist. Run pytest with --update-locks" in out
    assert suite("--update-locks")[0] == 0
    assert (tmp_path / "locks" / "digits.lock").is_file()
    assert suite()[0] == 0
    code, out = suite(options=', dtype="float16"')
    assert code == 1
    assert "dtype: bfloat16 → float16" in out
    assert "If it is meant: pytest --update-locks" in out
    assert "Traceback" not in out


def test_the_plugin_imports_no_torch():
    script = "import sys, vlmbuild.pytest_locks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
