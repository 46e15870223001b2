"""Command-line entry point: the list of commands and one error boundary. Commands import lazily."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

import click

from vlmbuild.cli.output import printable, quiet_libraries
from vlmbuild.errors import ReportedError, UsageError, VlmbuildError
from vlmbuild.util.interrupt import TERMINATED, check_interrupted, ending_signals
from vlmbuild.util.torchvision import blame_torchvision

COMMANDS: dict[str, str] = {
    "plan": "vlmbuild.cli.plan",
    "build": "vlmbuild.cli.build",
    "verify": "vlmbuild.cli.verify",
    "inspect": "vlmbuild.cli.inspect",
    "run": "vlmbuild.cli.run",
    "lock": "vlmbuild.cli.lock",
    "check": "vlmbuild.cli.check",
    "diff": "vlmbuild.cli.diff",
    "sign": "vlmbuild.cli.sign",
    "push": "vlmbuild.cli.push",
    "demo": "vlmbuild.cli.demo",
}
"""Name of each command -> module whose `command` it is, in the order of `vlmbuild --help`."""

INTERRUPTED = 130
_TRACEBACK = "VLMBUILD_TRACEBACK"
_NO_OUTPUT = "interrupted; no partial output was left behind."


class LazyGroup(click.Group):
    """A group whose commands are imported when they run or show their help."""

    def __init__(self, *args: object, modules: Mapping[str, str], **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]  # click's own arguments pass through
        self.modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.modules:
            return None
        command: click.Command = importlib.import_module(self.modules[cmd_name]).command
        return command


def _use_plugins(_: click.Context, __: click.Parameter, names: tuple[str, ...]) -> None:
    """Import plugins before a command is, whose choices may name what they add."""
    if names:
        from vlmbuild.builder.plugins import use_plugins

        use_plugins(*names)


@click.group(
    cls=LazyGroup,
    modules=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(importlib.metadata.version("vlmbuild"), package_name="vlmbuild", message="%(prog)s %(version)s")
@click.option(
    "--plugin",
    multiple=True,
    metavar="NAME",
    expose_value=False,
    callback=_use_plugins,
    help="Import an installed plugin: a family, a pass or a target. Repeat for several.",
)
def cli() -> None:
    """Compile vision-language models into trainable, verified artifacts.

    \b
    Try it offline on a CPU; it takes about two minutes:
        vlmbuild demo

    \b
    On your own model:
        vlmbuild plan   Qwen/Qwen2-VL-2B-Instruct --quantize nf4
        vlmbuild build  Qwen/Qwen2-VL-2B-Instruct -o qwen2-vl-nf4 --quantize nf4
        vlmbuild verify qwen2-vl-nf4
        vlmbuild run    qwen2-vl-nf4 --image photo.jpg --prompt "What is this?"

    \b
    Exit codes:
        0 success            1 failure                2 invalid usage
        3 corrupt artifact   4 untrusted code         5 incompatible artifact
        6 graphs differ      7 an engine differs      130, 143 interrupted
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Every error ends here, as one paragraph on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    with ending_signals():
        try:
            with blame_torchvision():
                cli.main(arguments, prog_name="vlmbuild", standalone_mode=False)
        except ReportedError as error:
            _say(f"error: {error}", err=True)
            return error.exit_code
        except VlmbuildError as error:
            return _fail(arguments, type(error).__name__, str(error), error.exit_code)
        except click.UsageError as error:
            if not arguments:  # the message is the help
                click.echo(error.format_message(), err=True)
                return UsageError.exit_code
            hint = f" Try `{error.ctx.command_path} --help`." if error.ctx else ""
            return _fail(arguments, "UsageError", error.format_message() + hint, UsageError.exit_code)
        except click.ClickException as error:
            return _fail(arguments, type(error).__name__, error.format_message(), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            return _fail(arguments, "Interrupted", _NO_OUTPUT, INTERRUPTED)
        except SystemExit as stop:
            if stop.code == TERMINATED:
                return _fail(arguments, "Interrupted", _NO_OUTPUT, TERMINATED)
            return stop.code if isinstance(stop.code, int) else 1
        except Exception as error:
            return _end_unexpectedly(arguments, error)
    return 0


def _fail(arguments: Sequence[str], kind: str, message: str, code: int) -> int:
    if "--json" in arguments:
        _say(json.dumps({"error": {"type": kind, "message": message, "exit_code": code}}, indent=2))
    _say(f"error: {message}", err=True)
    return code


def _say(text: str, *, err: bool = False) -> None:
    """Print even if the reader has closed the pipe: the exit code must still be the error's."""
    try:
        click.echo(printable(text), err=err)
    except BrokenPipeError:
        stream = sys.stderr if err else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # where the interpreter flushes at exit


def _end_unexpectedly(arguments: Sequence[str], error: Exception) -> int:
    try:
        check_interrupted()  # some libraries turn an interrupt into an error of their own
    except KeyboardInterrupt:
        return _fail(arguments, "Interrupted", _NO_OUTPUT, INTERRUPTED)
    except SystemExit:
        return _fail(arguments, "Interrupted", _NO_OUTPUT, TERMINATED)
    if os.environ.get(_TRACEBACK):
        traceback.print_exception(error)
    message = (
        f"unexpected {type(error).__name__}: {error}. This is a bug in vlmbuild or in a library that it uses. "
        f"Run the command again with {_TRACEBACK}=1 and report the traceback."
    )
    return _fail(arguments, type(error).__name__, message, 1)
