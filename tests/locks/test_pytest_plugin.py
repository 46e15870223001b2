"""The pytest plugin, in test suites of its own; they run in this process, which has traced the model."""

from __future__ import annotations

import subprocess
import sys

import pytest

SUITE = """
from vlmbuild import Recipe

def test_graph(graph_lock):
    graph_lock("digits", Recipe(attention="sdpa"{options}), source="qwen2-vl-digits", kernels=False)
"""


@pytest.fixture
def suite(tmp_path, monkeypatch, capsys):
    """Run pytest on such a suite: exit code and output."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.chdir(tmp_path)

    def suite(*arguments, options=""):
        (tmp_path / "test_graphs.py").write_text(SUITE.format(options=options))
        monkeypatch.delitem(sys.modules, "test_graphs", raising=False)
        plugins = ["-p", "vlmbuild.locks.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        code = pytest.main(["-q", "--import-mode=importlib", *plugins, *arguments, "test_graphs.py"])
        return code, capsys.readouterr().out

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
    assert "--update-locks" in out
    assert "Traceback" not in out


def test_installing_vlmbuild_installs_the_plugin(pytestconfig):
    plugin = pytestconfig.pluginmanager.get_plugin("vlmbuild")
    assert plugin.__name__ == "vlmbuild.locks.pytest_plugin"


def test_the_plugin_imports_no_torch():
    script = "import sys, vlmbuild.locks.pytest_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
