"""Differences for people and machines: coloured text, Markdown for a pull request, JSON, and JUnit XML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

import click

from vlmbuild.locks.check import Checked
from vlmbuild.locks.difference import SEVERITIES, TITLES, Difference, Finding, Severity

_COLOURS: dict[Severity, str] = {
    "interface": "red",
    "numerics": "red",
    "fusion": "magenta",
    "cost": "yellow",
    "cosmetic": "cyan",
}
_LINE_COLOURS = {"+": "green", "-": "red", "@": "cyan"}
_MOST_LINES = 60
"""Of a listing's diff that a report shows; the rest is counted."""


def text(name: str, difference: Difference) -> list[str]:
    """Lines with ANSI colours, which `click.echo` leaves out where they would not show."""
    if not difference.findings:
        return [*(f"{name}: note: {note}" for note in difference.notes), f"{name}: no difference"]
    lines = [click.style(name, bold=True)]
    for severity in SEVERITIES:
        findings = difference.of(severity)
        if findings:
            lines.append(click.style(f"  {TITLES[severity]} ({len(findings)})", fg=_COLOURS[severity], bold=True))
        for finding in findings:
            lines.append(f"    {finding.place}: {finding.text}")
            lines += [f"      {_coloured(line)}" for line in _shown(finding)]
    return [*lines, *(f"  note: {note}" for note in difference.notes)]


def markdown(name: str, difference: Difference) -> list[str]:
    """A section for a pull-request comment; listings are folded."""
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
    """Plain values for JSON."""
    return {"findings": [asdict(finding) for finding in difference.findings], "notes": list(difference.notes)}


def check_document(results: Sequence[Checked], limit: Severity) -> dict[str, Any]:
    """Plain values of a whole check."""
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
    """JUnit XML: one test case a lock, as CI servers show them; one fails from a severity on."""
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


def check_lines(results: Iterable[Checked], style: str) -> Iterator[str]:
    """The report of a check, as "text" or "markdown"."""
    for result in results:
        if result.error:
            heading = f"### `{result.path.stem}`\n\n" if style == "markdown" else ""
            yield f"{heading}{result.path}: cannot be compared: {result.error}"
        elif style == "markdown":
            yield from markdown(result.path.stem, result.difference)
        else:
            yield from text(str(result.path), result.difference)


def _shown(finding: Finding) -> list[str]:
    rest = len(finding.listing) - _MOST_LINES
    return [*finding.listing[:_MOST_LINES], *([f"@@ and {rest} more lines"] if rest > 0 else [])]


def _coloured(line: str) -> str:
    colour = _LINE_COLOURS.get(line[:1])
    return click.style(line, fg=colour) if colour else line


def _escaped(words: str) -> str:
    """Markdown must not take what code has for its own marks; between backticks it does not."""
    parts = words.split("`")
    return "`".join(
        part if number % 2 else part.replace("*", "\\*").replace("_", "\\_") for number, part in enumerate(parts)
    )


def _first_line(message: str) -> str:
    return message.partition("\n")[0]
