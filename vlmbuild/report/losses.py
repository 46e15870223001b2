"""Report of the rounding loss of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmbuild.quant.spec import ROUNDED_BEFORE
from vlmbuild.report.layout import Report, notes, table


def losses_table(document: Mapping[str, Any]) -> Report:
    """Make a table of what rounding lost in layers that it was measured in, with a note on layers that were rounded before."""
    if (document["recipe"].get("quantize") or {}).get("format") == "auto":
        return []  # those errors are squares, which decided what is kept
    decisions = [entry for record in document["passes"] for entry in record.get("decisions", ())]
    measured = [entry for entry in decisions if entry.get("error") and entry["format"]]
    if not measured:
        return []
    rows = [_row(form, measured) for form in dict.fromkeys(entry["format"] for entry in measured)]
    before = sorted(
        {text.partition(ROUNDED_BEFORE)[2] for entry in measured if ROUNDED_BEFORE in (text := entry["reason"])}
    )
    note = (
        f"The weights were rounded before, to {' and '.join(before)}: the loss is that of the second rounding alone. To round "
        "once, build from the unquantized checkpoint, with --adapter if one is merged."
    )
    return [
        "",
        table(["Rounding", "layers", "mean loss", "greatest", "of"], rows, "<>>><"),
        *(notes(note) if before else []),
    ]


def _row(form: str, measured: Sequence[Mapping[str, Any]]) -> list[str]:
    losses = {entry["module"]: float(entry["error"]) for entry in measured if entry["format"] == form}
    worst = max(losses, key=losses.__getitem__)
    mean = sum(losses.values()) / len(losses)
    shares = [f"{100 * loss:.2f} %" for loss in (mean, losses[worst])]
    return [form, str(len(losses)), *shares, ".".join(worst.split(".")[-4:])]
