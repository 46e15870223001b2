"""A command takes one file and one row of `COMMANDS`; help, errors and exit codes follow."""

from __future__ import annotations

import importlib
import pkgutil

import vlmbuild.cli
from vlmbuild.cli import COMMANDS

MODULE = '''
import click
from vlmbuild.cli.options import json_option
from vlmbuild.cli.output import print_json
from vlmbuild.errors import IntegrityError

@click.command()
@click.argument("name")
@json_option
def command(name, as_json):
    """Greet somebody."""
    if name == "nobody":
        raise IntegrityError("There is nobody to greet. Pass a name.")
    print_json({"name": name}) if as_json else click.echo(f"Hello, {name}.")
'''


def test_a_file_and_a_row_are_enough(run, tmp_path, monkeypatch):
    (tmp_path / "greeting_command.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "greet", "greeting_command")
    assert "greet    Greet somebody." in run("--help")[1]
    assert run("greet", "you") == (0, "Hello, you.\n", "")
    assert run("greet", "you", "--json")[1] == '{\n  "name": "you"\n}\n'
    assert run("greet", "nobody") == (3, "", "error: There is nobody to greet. Pass a name.\n")
    assert run("greet")[0] == 2


def test_every_command_has_its_file_and_its_row():
    modules = [f"vlmbuild.cli.{module.name}" for module in pkgutil.iter_modules(vlmbuild.cli.__path__)]
    assert {name for name in modules if hasattr(importlib.import_module(name), "command")} == set(COMMANDS.values())
