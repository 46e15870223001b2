"""Output of the command line: documents, tables, progress; and switches that keep other libraries quiet."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from rich.table import Table

    Report = Callable[[Mapping[str, Any]], Iterable[str | Table]]

_LABEL_WIDTH = 16
_MAX_WIDTH = 100
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


def show(document: Mapping[str, Any], report: Report, *, as_json: bool) -> None:
    """Print a command's document as JSON, or as the lines and tables that `report` makes of it."""
    if as_json:
        print_json(document)
    else:
        print_report(report(document))


def print_report(parts: Iterable[str | Table]) -> None:
    """Print lines as they are, and tables in the width of the terminal; 80 columns where there is none."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.width = min(console.width, _MAX_WIDTH)
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    for line in captured.get().splitlines():
        click.echo(line.rstrip())  # rich fills cells with spaces


class StageProgress:
    """Shows the stages of a long job on stderr: a bar on a terminal, else one line per finished stage, or nothing.

    Called with a stage's name, the amount done, and the total, as `vlmbuild.build` does; a context that ends the last bar.
    """

    def __init__(self, *, lines: bool = True) -> None:
        self._terminal = sys.stderr.isatty()
        self._lines = lines and not self._terminal
        self._stage: str | None = None
        self._started = 0.0
        self._bar: Any = None
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(failed=kind is not None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._end()
            self._begin(stage, total)
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done = done
        if done >= total:
            self._end()

    def _begin(self, stage: str, total: int) -> None:
        self._stage, self._started, self._done = stage, time.monotonic(), 0
        if self._terminal:
            self._bar = click.progressbar(
                length=total, label=f"{stage:<{_LABEL_WIDTH}}", file=sys.stderr, show_eta=total > 100, width=30
            )
            self._bar.render_progress()

    def _end(self, *, failed: bool = False) -> None:
        if self._stage is None:
            return
        if self._bar is not None:
            self._bar.render_finish()
        elif self._lines and not failed:
            click.echo(f"{self._stage:<{_LABEL_WIDTH}} {time.monotonic() - self._started:6.1f} s", err=True)
        self._stage, self._bar = None, None
