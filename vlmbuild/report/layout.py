"""Tables and notes of reports: they fit the terminal, and 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from vlmbuild.util.text import terminal_width

if TYPE_CHECKING:
    from rich.table import Table

Report: TypeAlias = "list[str | Table]"
WIDTH = 80


def records_table(
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]], records: Iterable[Mapping[str, Any]], alignment: str
) -> Table:
    """Make a table of records: head -> text of a record; columns without any text are left out."""
    rows = [[text(record) for text in columns.values()] for record in records]
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    heads = list(columns)
    return table(
        [heads[index] for index in used],
        [[row[index] for index in used] for row in rows],
        "".join(alignment[index] for index in used),
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], alignment: str) -> Table:
    """Make a table; `alignment` has "<" or ">" for each column."""
    from rich.table import Table

    rows = list(rows)
    columns = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    widths = _widths([[head, *(row[index] for row in rows)] for index, head in enumerate(heads)])
    for head, side, width in zip(heads, alignment, widths, strict=True):
        justify: Literal["left", "right"] = "left" if side == "<" else "right"
        columns.add_column(head, justify=justify, overflow="fold", max_width=width)
    for row in rows:
        columns.add_row(*row)
    return columns


def _widths(columns: Sequence[Sequence[str]]) -> list[int]:
    """Return widths of columns that fit the terminal, narrowing the widest first: rich would break words."""
    widths = [max(map(len, cells)) for cells in columns]
    words = [max((len(word) for cell in cells for word in cell.split()), default=0) for cells in columns]
    while sum(widths) + 2 * (len(widths) - 1) > terminal_width(WIDTH):
        loose = [index for index, width in enumerate(widths) if width > words[index]]
        if not loose:
            break
        widths[max(loose, key=lambda index: widths[index])] -= 1
    return widths


def facts_table(values: Mapping[str, str]) -> Table:
    """Make a table of names and values, without a head."""
    columns = table(["", ""], values.items(), "<<")
    columns.show_header = False
    return columns


def notes(text: str) -> list[str]:
    """Break a note below a table into lines."""
    return textwrap.wrap(
        text, terminal_width(WIDTH), initial_indent="  - ", subsequent_indent="    ", break_long_words=False
    )
