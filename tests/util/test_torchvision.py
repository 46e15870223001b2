"""A torchvision that does not fit torch is named, with the line that installs the right one, and is no defect of vlmbuild."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vlmbuild.util.torchvision import install_line, torchvision_named

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
    for fact in (f"torch {torch.__version__}", "torchvision::nms", install_line(torch.__version__)):
        assert fact in run.stderr
    assert "bug" not in run.stderr


def test_other_errors_stay():
    with pytest.raises(RuntimeError, match="other"), torchvision_named():
        raise RuntimeError("other")


def test_the_line_names_the_version_and_the_index_of_torch():
    assert install_line("2.13.0").endswith("'torchvision==0.28.*'")
    assert "0.26.* --index-url https://download.pytorch.org/whl/cu126" in install_line("2.11.1+cu126").replace("'", "")
