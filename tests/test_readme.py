"""The README's training script runs as it stands, and its commands exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from vlmbuild.cli import cli

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_training_script_runs_as_it_stands(tmp_path, monkeypatch):
    (script,) = re.findall(r"```python\n# finetune\.py\n(.*?)```", README, re.DOTALL)
    (tmp_path / "finetune.py").write_text(script)
    monkeypatch.setenv("VLMBUILD_CACHE", str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "finetune.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    audit, last = done.stdout.strip().splitlines()[-2:]
    assert audit.startswith("All 42 trainable parameters get a gradient")
    assert float(last.removeprefix("last loss ")) < 1.5
    assert (tmp_path / "largest-digit-adapter" / "adapter_model.safetensors").is_file()


BLOCKS = "\n".join(re.findall(r"```(?:sh)?\n(.*?)```", README, re.DOTALL))
COMMANDS = sorted(set(re.findall(r"^(?:\$ )?vlmbuild (\w+ .*?)(?:#.*)?$", BLOCKS, re.MULTILINE)))


@pytest.mark.parametrize("line", COMMANDS)
def test_options_of_commands_exist(line):
    name, *arguments = shlex.split(line)
    command = cli.commands[name]
    known = {option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts}
    assert {argument for argument in arguments if re.fullmatch(r"--?[a-z][a-z-]*", argument)} <= known
