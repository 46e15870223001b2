"""Output of the command line: documents, tables, progress; and switches that keep other libraries quiet."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

import click

from vlmbuild.util.interrupt import check_interrupted
from vlmbuild.util.text import terminal_width

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    Report = Callable[[Mapping[str, Any]], Iterable[str | Table]]

_LABEL_WIDTH = 16
_NOISY_LOGGERS = ("bitsandbytes", "huggingface_hub", "torch", "transformers")


def quiet_libraries() -> None:
    """Let only errors of other libraries reach the user, through their own switches; call it before they are imported.

    bitsandbytes suggests an optional kernel package, transformers and torch.export warn about their own deprecations,
    huggingface_hub draws a bar per file. None of it is for the user of this command, and `setdefault` leaves every switch
    to whoever wants to see it.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(document, indent=2, default=str))


def printable(text: str) -> str:
    """Escape what would move a terminal's cursor or change its colours: text of others may hold it."""
    return "".join(mark if mark.isprintable() or mark in "\n\t" else repr(mark)[1:-1] for mark in text)


def _printable(value: Any) -> Any:
    """Escape all texts of a document."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list | tuple) else value


def show(document: Mapping[str, Any], report: Report, *, as_json: bool) -> None:
    """Print a command's document as JSON, or as the lines and tables that `report` makes of it.

    Tables fit the terminal, and 80 columns.
    """
    if as_json:
        print_json(document)
        return
    from rich.console import Console

    from vlmbuild.report.layout import WIDTH

    console = Console(highlight=False, markup=False, emoji=False)
    console.width = terminal_width(WIDTH)
    with console.capture() as captured:
        for part in report(_printable(document)):
            console.print(part, soft_wrap=isinstance(part, str))
    for line in captured.get().splitlines():
        click.echo(line.rstrip())  # rich fills cells with spaces


class StageProgress(AbstractContextManager["StageProgress"]):
    """Stages of a long job on stderr: bars on a terminal, else one line per stage, or nothing.

    Called with a stage's name, the amount done, and the total, as `vlmbuild.build` does. The first stage, "start", lasts
    until the first call: importing torch takes seconds.

    Args:
        lines: Keep the stages on the screen, and print lines where there is no terminal.
    """

    def __init__(self, *, lines: bool = True) -> None:
        self._lines = lines and not sys.stderr.isatty()
        self._keep = lines
        self._stage: str | None = None
        self._started = 0.0
        self._bars: Progress | None = None
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            columns = (TextColumn(f"{{task.description:<{_LABEL_WIDTH}}}"), BarColumn(30), TaskProgressColumn())
            console = Console(stderr=True)
            self._bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=not self._keep)
            self._bars.start()
        self("start", 0, 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(failed=kind is not None)
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        check_interrupted()
        if stage != self._stage:
            self._end()
            self._stage, self._started = stage, time.monotonic()
            if self._lines:
                click.echo(f"{stage:<{_LABEL_WIDTH}} ", err=True, nl=False)
            if self._bars is not None:
                self._bar = self._bars.add_task(stage, total=total)
        if self._bars is not None:
            self._bars.update(self._bar, completed=done, total=total)
        if done >= total:
            self._end()

    def _end(self, *, failed: bool = False) -> None:
        if self._stage is None:
            return
        if self._lines:
            click.echo("stopped" if failed else f"{time.monotonic() - self._started:6.1f} s", err=True)
        if self._bars is not None and not failed:
            self._bars.update(self._bar, completed=self._bars.tasks[self._bar].total)
            self._bars.stop_task(self._bar)
        self._stage = None
