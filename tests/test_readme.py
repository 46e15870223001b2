"""The training script of the README runs; commands and files that documents name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from vlmbuild.cli import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("*/**/*.md"))
    if ".venv" not in path.parts and "build" not in path.parts
]
README = (ROOT / "README.md").read_text()


def test_training_script_runs(tmp_path, monkeypatch):
    """With a quarter of the samples."""
    (script,) = re.findall(r"```python\n# finetune\.py\n(.*?)```", README, re.DOTALL)
    assert ".take(2048)" in script
    (tmp_path / "finetune.py").write_text(script.replace(".take(2048)", ".take(512)"))
    monkeypatch.setenv("VLMBUILD_CACHE", str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "finetune.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    audit, last = done.stdout.strip().splitlines()[-2:]
    assert audit.startswith("All 42 trainable parameters get a gradient")
    assert float(last.removeprefix("last loss ")) < 1.5
    assert (tmp_path / "largest-digit-adapter" / "adapter_model.safetensors").is_file()


def commands(path):
    blocks = "\n".join(re.findall(r"```(?:sh)?\n(.*?)```", path.read_text(), re.DOTALL))
    blocks += "\n".join(re.findall(r"^    (vlmbuild .*)$", path.read_text(), re.MULTILINE))
    return sorted(set(re.findall(r"^(?:\$ )?vlmbuild (\w+ .*?)(?:#.*)?$", blocks, re.MULTILINE)))


@pytest.mark.parametrize(
    ("path", "line"),
    [pytest.param(path, line, id=f"{path.parent.name}: {line}") for path in DOCUMENTS for line in commands(path)],
)
def test_options_of_commands_exist(path, line):
    name, *arguments = shlex.split(line)
    command = cli.get_command(click.Context(cli), name)
    known = {option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts}
    assert {argument for argument in arguments if re.fullmatch(r"--?[a-z][a-z-]*", argument)} <= known, path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = [(path.parent, link) for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    names = re.findall(r"`((?:vlmbuild|passes|targets|tests|artifacts|\.github|\.ci)/[\w./-]*)`", text)
    for folder, name in (*links, *((ROOT, name) for name in names)):
        assert (folder / name).exists(), name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_a_clone_is_no_empty_package_for_python_started_above_it(tmp_path):
    (tmp_path / "vlmbuild").symlink_to(ROOT)
    code = "import vlmbuild, vlmbuild.passes, vlmbuild.targets.onnx; print(vlmbuild.load.__module__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "vlmbuild.runtime.load"
