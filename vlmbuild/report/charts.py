"""Bar charts as inline SVG; every bar says its figure in text, so nothing depends on colour."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_LABEL, _BAR, _ROW, _FIGURE = 240, 420, 22, 130


def bars(values: Mapping[str, int], title: str, unit: str = "") -> str:
    """Horizontal bars, one a value; the longest is the largest."""
    most = max(values.values(), default=0) or 1
    height = _ROW * len(values)
    rows = []
    for place, (name, value) in enumerate(values.items()):
        y = place * _ROW
        figure = f"{value:,}{f' {unit}' if unit else ''}"
        rows.append(
            f'<g tabindex="0" role="img" aria-label="{escape(f"{name}: {figure}")}">'
            f'<text class="label" x="{_LABEL - 8}" y="{y + 15}">{escape(name)}</text>'
            f'<rect class="bar" x="{_LABEL}" y="{y + 3}" width="{max(1, _BAR * value / most):.0f}" height="{_ROW - 6}"/>'
            f'<text class="figure" x="{_LABEL + 6 + max(1, _BAR * value / most):.0f}" y="{y + 15}">{figure}</text></g>'
        )
    width = _LABEL + _BAR + _FIGURE
    opening = (
        f'<svg class="chart" role="group" aria-label="{escape(title)}" viewBox="0 0 {width} {height}" width="{width}" '
    )
    return f'<figure><figcaption>{escape(title)}</figcaption>{opening}height="{height}">{"".join(rows)}</svg></figure>'
