"""Render differences as coloured text, Markdown for a pull request, JSON, and JUnit XML."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import click

from vlmbuild.locks.difference import SEVERITIES, TITLES, Difference, Finding, Severity

if TYPE_CHECKING:
    from vlmbuild.locks.check import Checked

_COLOURS: dict[Severity, str] = {
    "interface": "red",
    "numerics": "red",
    "fusion": "magenta",
    "cost": "yellow",
    "cosmetic": "cyan",
}
_LINE_COLOURS = {"+": "green", "-": "red", "@": "cyan"}
_MAX_LINES = 60
"""Lines of a listing's diff in a report; the rest is counted."""
_MAX_SUMMARY = 8
WIDTH = 100
"""Most columns of a report."""


def text(name: str, difference: Difference, width: int = WIDTH) -> list[str]:
    """Render a difference with ANSI colours (`click.echo` drops them outside terminals) in `width` columns."""
    count = len(difference.findings)
    title = _wrapped(f"{name}: {count or 'no'} difference{'s' * (count != 1)}", "", "  ", width)
    lines = [click.style(line, bold=True) for line in title] if count else title
    for severity in SEVERITIES:
        if findings := difference.of(severity):
            lines += ["", click.style(TITLES[severity], fg=_COLOURS[severity], bold=True)]
        for finding in findings:
            lines += _wrapped(f"{finding.place}: {finding.text}", "  ", "    ", width)
            lines += [
                click.style(part, fg=_LINE_COLOURS.get(line[:1]))
                for line in _shown(finding)
                for part in _folded(line, width)
            ]
    return [*lines, *(line for note in difference.notes for line in _wrapped(f"note: {note}", "  ", "    ", width))]


def check_summary(results: Sequence[Checked], limit: Severity, width: int = WIDTH) -> list[str]:
    """Summarize a check in at most ten lines: how many locks differ, and the first of them."""
    failed = [result for result in results if result.fails(limit)]
    lines = [click.style(f"{len(results)} lock{'s' * (len(results) != 1)}, {len(failed) or 'none'} failed", bold=True)]
    for result in failed[:_MAX_SUMMARY]:
        worst = result.difference.findings[0] if result.difference.findings else None
        reason = f"{len(result.difference.findings)}, first: {worst.place}: {worst.text}" if worst else result.error
        lines.append(_cut(f"  {result.path.stem}: {reason}", width))
    rest = len(failed) - _MAX_SUMMARY
    return [*lines, *([f"  and {rest} more"] if rest > 0 else []), ""]


def markdown(name: str, difference: Difference) -> list[str]:
    """Render a section of a pull-request comment; listings are folded."""
    if not difference.findings:
        return [f"### `{name}`: no difference", *(f"> {note}" for note in difference.notes), ""]
    lines = [f"### `{name}`", ""]
    for severity in SEVERITIES:
        findings = difference.of(severity)
        if findings:
            lines += [f"**{TITLES[severity]}**", ""]
        for finding in findings:
            lines.append(f"- `{finding.place}`: {_escaped(finding.text)}")
            if finding.listing:
                lines += ["", "  <details><summary>listing</summary>", "", "  ```diff"]
                lines += [f"  {line}" for line in _shown(finding)]
                lines += ["  ```", "", "  </details>", ""]
        lines += [""] if findings else []
    return [*lines, *(f"> {note}" for note in difference.notes), ""]


def document(difference: Difference) -> dict[str, Any]:
    """Return plain values for JSON."""
    return {"findings": [asdict(finding) for finding in difference.findings], "notes": list(difference.notes)}


def check_document(results: Sequence[Checked], limit: Severity) -> dict[str, Any]:
    """Return the plain values of a check."""
    return {
        "locks": [
            {
                "path": str(result.path),
                "fails": result.fails(limit),
                "error": result.error,
                "seconds": round(result.seconds, 2),
                **document(result.difference),
            }
            for result in results
        ]
    }


def junit(results: Sequence[Checked], limit: Severity) -> str:
    """Render JUnit XML with one test case per lock; it fails from the severity `limit` on."""
    failures = sum(result.fails(limit) and not result.error for result in results)
    errors = sum(bool(result.error) for result in results)
    suite = ElementTree.Element(
        "testsuite",
        name="vlmbuild check",
        tests=str(len(results)),
        failures=str(failures),
        errors=str(errors),
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        case = ElementTree.SubElement(
            suite, "testcase", classname="vlmbuild.locks", name=result.path.stem, time=f"{result.seconds:.3f}"
        )
        if result.error:
            ElementTree.SubElement(case, "error", message=_first_line(result.error)).text = result.error
        elif result.fails(limit):
            body = click.unstyle("\n".join(text(result.path.stem, result.difference)))
            message = result.difference.findings[0]
            failure = ElementTree.SubElement(case, "failure", message=f"{message.place}: {message.text}")
            failure.text = body
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def check_lines(results: Sequence[Checked], style: str, limit: Severity, width: int = WIDTH) -> Iterator[str]:
    """Render a check as "text", in `width` columns, or "markdown"."""
    yield from (click.unstyle(line) if style == "markdown" else line for line in check_summary(results, limit, width))
    for result in results:
        if result.error and style == "markdown":
            yield f"### `{result.path.stem}`\n\n{result.path}: cannot be compared: {result.error}"
        elif result.error:
            yield from _wrapped(f"{result.path}: cannot be compared: {result.error}", "", "  ", width)
        elif style == "markdown":
            yield from markdown(result.path.stem, result.difference)
        else:
            yield from text(str(result.path), result.difference, width)


def _shown(finding: Finding) -> list[str]:
    rest = len(finding.listing) - _MAX_LINES
    return [*finding.listing[:_MAX_LINES], *([f"@@ {rest} more lines"] if rest > 0 else [])]


def _wrapped(line: str, first: str, rest: str, width: int) -> list[str]:
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line, width, initial_indent=first, subsequent_indent=rest, **options)


def _folded(line: str, width: int) -> list[str]:
    """Wrap a line of a listing's diff; each part starts with the line's mark."""
    mark, code = line[:1], line[1:]
    indent = " " * (len(code) - len(code.lstrip()))
    return _wrapped(code.strip(), f"    {mark}{indent}", f"    {mark}{indent}      ", width) or [f"    {mark}"]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _escaped(words: str) -> str:
    """Escape the marks of Markdown outside backticks."""
    parts = words.split("`")
    return "`".join(
        part if number % 2 else part.replace("*", "\\*").replace("_", "\\_") for number, part in enumerate(parts)
    )


def _first_line(message: str) -> str:
    return message.partition("\n")[0]
