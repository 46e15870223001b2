"""A torchvision that does not fit torch is named, with the line that installs the right one, and is no defect of vlmbuild."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vlmbuild.util.torchvision import blame_torchvision, remedy

USES = {
    "import": "import vlmbuild; vlmbuild.plan",
    "command": "from vlmbuild.cli import main; raise SystemExit(main(['plan', 'qwen2-vl-digits']))",
}


@pytest.mark.parametrize("use", USES)
def test_a_torchvision_that_cannot_be_imported(use, tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    where = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    run = subprocess.run([sys.executable, "-c", USES[use]], env=where, capture_output=True, text=True, check=False)
    assert run.returncode == {"import": 1, "command": 5}[use]
    for fact in (f"torch {torch.__version__}", "torchvision::nms", remedy(torch.__version__)):
        assert fact in run.stderr
    assert "bug" not in run.stderr


def test_other_errors_stay():
    with pytest.raises(RuntimeError, match="other"), blame_torchvision():
        raise RuntimeError("other")


def test_the_line_names_the_version_and_the_index_of_torch():
    assert remedy("2.13.0").endswith("'torchvision==0.28.*'")
    assert "0.26.* --index-url https://download.pytorch.org/whl/cu126" in remedy("2.11.1+cu126").replace("'", "")


@pytest.mark.parametrize(
    "version", ["2.11.0a0+ebedce2.nv25.02", "2.13.0+gitabc123", "2.14.0.dev20261101+cu126", "2.13.0rc2", "3.0.0"]
)
def test_no_index_is_named_for_builds_that_are_on_none(version):
    assert "built for this torch" in remedy(version)
    assert "pip install" not in remedy(version)
