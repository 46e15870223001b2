"""Report of an engine beside an artifact's golden cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlmbuild.report.layout import Report, records_table
from vlmbuild.report.tables import verify_report

_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "Stage": lambda result: result["stage"],
    "error": lambda result: result["error"],
    "tolerance": lambda result: result["tolerance"],
    "verdict": lambda result: result["verdict"],
    "worst case": lambda result: result["case"],
    "note": lambda result: result["note"],
}

_NAMED = 3
"""Cases that are named; of more the number is given."""


def engine_report(document: Mapping[str, Any]) -> Report:
    """Report of `vlmbuild verify --engine`: the worst case of each stage, and the first stage that differs."""
    engine = document["engine"]
    first = engine["first"]
    verdict = "no stage differs" if first is None else f"the first stage that differs is {first['stage']}"
    head = f"{engine['name']} ({engine['version']}), {engine['cases']} cases:"
    left = [f"left out: {', '.join(engine['left_out'])} (more images than it takes)"] if engine["left_out"] else []
    own = engine["own_pixels"]
    names = ", ".join(own) if len(own) <= _NAMED else f"{len(own)} cases"
    judged = [f"compared on the engine's own pixels: {names}"] if own else []
    return [
        *verify_report(document),
        "",
        head,
        verdict,
        *left,
        *judged,
        "",
        records_table(_COLUMNS, engine["stages"], "<>><<<"),
    ]
