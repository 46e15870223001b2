"""One self-contained page about an artifact: no script, no other file, no network; light and dark; narrow and wide."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmbuild.artifact.output import human_size
from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.builder.passes import exact_passes
from vlmbuild.errors import UsageError
from vlmbuild.ir.cost import region_cost
from vlmbuild.ir.everyday import EVERYDAY, everyday_value
from vlmbuild.ir.printer import digest, region_text
from vlmbuild.ir.program import Region
from vlmbuild.locks.listing_difference import is_equal, side_by_side
from vlmbuild.measure.pass_parity import GRADIENT_TOLERANCE, TOLERANCE, pass_parity
from vlmbuild.report.contents import contents, region_weights
from vlmbuild.report.stages import STORED, Staged, stages_of
from vlmbuild.util.progress import Progress

_LAYER = re.compile(r"\.(\d+)\.")


def page(path: Path, progress: Progress | None = None) -> str:
    """Render the page.

    Raises:
        IntegrityError, IncompatibleError: The artifact cannot be read.
        CaptureError: Its model cannot be traced again.
    """
    document = contents(path)
    staged = stages_of(path, progress)
    style = (files("vlmbuild.report") / "style.css").read_text(encoding="utf-8")
    sections = {
        "Model": _model(path, staged),
        "Passes": _passes(document, staged),
        "Quantization": _quantization(document),
        "Parity": _parity(staged, document),
        "Recipe": _recipe(document),
        "Files": _files(document),
    }
    links = "".join(f'<li><a href="#{title}">{title}</a></li>' for title in sections)
    body = "".join(
        f'<section aria-labelledby="{title}"><h2 id="{title}">{title}</h2>{"".join(parts)}</section>'
        for title, parts in sections.items()
    )
    name = escape(document["name"])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{name}</title>'
        f"<style>{style}</style></head><body><header><h1>{name}</h1>"
        f'<p class="soft">{document["target"]}, {human_size(document["bytes"])}<br>{_id(document["id"])}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main></body></html>\n'
    )


def _model(path: Path, staged: Staged) -> Iterator[str]:
    """Yield the map: a box per region, grouped by role, shaded by its share of the bytes."""
    weights = region_weights(ArtifactReader(path, verify=False))
    total = sum(weight.nbytes for entries in weights.values() for weight in entries)
    boxes: dict[str, list[str]] = {}
    for region in staged.stages[STORED].regions.values():
        entries = weights.get(region.name, [])
        roles = Counter(slot.role for slot in region.slots)
        boxes.setdefault(roles.most_common(1)[0][0] if roles else "other", []).append(
            _box(region, entries, total, staged)
        )
    yield f'<p class="soft">FLOPs {EVERYDAY}; bytes of stored weights, and their share as shading.</p><div class="map">'
    for role, items in boxes.items():
        yield f"<div><h3>{role}</h3><ul>{''.join(items)}</ul></div>"
    yield "</div>"


def _box(region: Region, weights: Sequence[Any], total: int, staged: Staged) -> str:
    size, count = sum(weight.nbytes for weight in weights), sum(weight.parameters for weight in weights)
    flops = everyday_value(region_cost(region, 4 if staged.recipe.dtype == "float32" else 2).flops)
    share = round(100 * size / total) if total else 0
    facts = "weights shared with another region"
    if count:
        facts = f"{8 * size / count:.1f} bits, {human_size(size)}, {share or 'under 1'} %"
    work = "" if flops is None else f"{_scaled(int(flops) * len(region.instances))}FLOPs"
    return (
        f'<li style="--share:{share}%"><b>{_breakable(region.name)}{_many(region)}</b>'
        f"<span>{facts}</span><span>{work}</span></li>"
    )


def _passes(document: Mapping[str, Any], staged: Staged) -> Iterator[str]:
    """Yield the effect of each pass: listings before and after, side by side."""
    records = {record["name"]: record for record in document["passes"]}
    traced = staged.stages[list(staged.stages)[-2]]
    same = all(
        name in traced.regions and digest(region) == digest(traced.regions[name])
        for name, region in staged.stages[STORED].regions.items()
        if not region.recipes
    )
    yield (
        '<p class="soft">This version of vlmbuild traced the model again from config.json. Its unquantized graphs are '
        f"{'equal to' if same else 'different from'} those in the artifact.</p>"
    )
    for stage, changes in staged.changes():
        names = [name for name in records if name not in staged.stages] if stage == STORED else [stage]
        title = ", ".join(f"{name}: {records[name]['matches']:,} rewritten" for name in names if name in records)
        regions = f"{len(changes)} region{'s' * (len(changes) != 1)} changed"
        listings = "".join(
            f"<h3>{_breakable(after.name)}{_many(after)}</h3>{_diff(region_text(before), region_text(after))}"
            for before, after in changes
        )
        yield f"<details><summary><b>{escape(title or stage)}</b>, {regions}</summary>"
        yield f'<div class="body">{_refusals(records, names)}{listings}</div></details>'


def _refusals(records: Mapping[str, Any], names: Sequence[str]) -> str:
    refusals = [refusal for name in names if name in records for refusal in records[name]["refusals"]]
    items = "".join(f"<li>{_breakable(refusal)}</li>" for refusal in refusals)
    return f"<h3>Left unchanged</h3><ul>{items}</ul>" if items else ""


def _diff(before: str, after: str) -> str:
    cells = []
    for pair in side_by_side(before, after):
        if pair is None:
            cells.append('<code class="gap">⋯</code>')
            continue
        old, new = pair
        if is_equal(old, new):
            cells.append(f'<code>  {_code(old or "")}</code><code class="again">  {_code(new or "")}</code>')
        else:
            cells.append('<code class="none"></code>' if old is None else f"<del><code>− {_code(old)}</code></del>")
            cells.append('<code class="none"></code>' if new is None else f"<ins><code>+ {_code(new)}</code></ins>")
    return f'<div class="diff" tabindex="0" role="region" aria-label="Before and after">{"".join(cells)}</div>'


def _quantization(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield decisions; layers with the same decision share a row."""
    rows: dict[tuple[str, str, str], tuple[list[int], list[float]]] = {}
    for record in document["passes"]:
        for entry in record.get("decisions", ()):
            number = _LAYER.search(entry["module"])
            module = _LAYER.sub(".*.", entry["module"], count=1)
            layers, errors = rows.setdefault((module, entry["format"], entry["reason"]), ([], []))
            layers += [int(number[1])] if number else []
            errors += [float(entry["error"])] if entry.get("error") else []
    if not rows:
        yield "<p>No weight was quantized by this build.</p>"
        return
    dtype = document["recipe"]["dtype"]
    yield _table(
        ["linear layer", "layers", "format", "largest error", "reason"],
        [
            [module, _ranges(layers), form or dtype, f"{max(errors):.1e}" if errors else "", reason]
            for (module, form, reason), (layers, errors) in rows.items()
        ],
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Shorten [0, 1, 2, 5] to "0–2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _parity(staged: Staged, document: Mapping[str, Any]) -> Iterator[str]:
    traced = staged.traced
    passes = exact_passes(replace(staged.recipe, attention="auto"))
    try:
        steps = pass_parity(traced.program, traced.family, traced.config, passes).steps
        yield (
            "<p>The captured graph compared with the graph after each exact pass, in float32 with seeded inputs: relative "
            f"errors, at most {TOLERANCE:.0e} forward and {GRADIENT_TOLERANCE:.0e} for gradients.</p>"
        )
        rows = [[s.name, _error(s.forward), _error(s.gradient), "equal" if s.holds else "differs"] for s in steps]
        yield _table(["after", "forward", "gradients", "result"], rows)
    except UsageError as error:
        yield f"<p>Not computed: {escape(str(error))}</p>"
    if document["numerics"]:
        heads = list(dict.fromkeys(key for record in document["numerics"] for key in record))
        yield "<h3>Measured by the build</h3>"
        yield _table(heads, [[str(record.get(head, "")) for head in heads] for record in document["numerics"]])


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _recipe(document: Mapping[str, Any]) -> Iterator[str]:
    recipe = dict(document["recipe"])
    spec = recipe.pop("quantize", None)
    rows = {**recipe, **({f"quantize.{key}": value for key, value in spec.items()} if spec else {"quantize": None})}
    yield _table(["option", "value"], [[key, _value(value)] for key, value in rows.items()])


def _value(value: Any) -> str:
    if not value and not isinstance(value, bool | int):
        return "none" if isinstance(value, list) else "not set"
    if isinstance(value, list):
        return ", ".join(
            str(item["pattern"] + "=" + item["format"] if isinstance(item, Mapping) else item) for item in value
        )
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _files(document: Mapping[str, Any]) -> Iterator[str]:
    sources = ", ".join(str(entry.get("uri")) for entry in document["source"])
    tools = ", ".join(f"{tool} {version}" for tool, version in sorted(document["toolchain"].items()))
    yield f"<p>Built from {_breakable(sources)} with {escape(tools)}.</p>"
    rows = [[entry["path"], entry["role"], human_size(entry["bytes"])] for entry in document["files"]]
    yield _table(["file", "role", "size"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = [escape(name) for name in heads]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = (
        "".join(f'<td data-head="{name}">{_breakable(cell)}</td>' for name, cell in zip(names, row, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _many(region: Region) -> str:
    return f" × {len(region.instances)}" if len(region.instances) > 1 else ""


def _breakable(text: str) -> str:
    """Escape text, and allow line breaks after dots, slashes and brackets between words."""
    return re.sub(r"(?<=[A-Za-z_*])([./(])(?=[\w*%])", r"\1<wbr>", escape(text))


def _code(text: str) -> str:
    """Escape a line of a listing, and allow line breaks before arguments."""
    return escape(text).replace("(", "(<wbr>")


def _id(text: str) -> str:
    """Render an id that breaks into groups of 16 digits."""
    digits = text.removeprefix("sha256:")
    return f"<code>sha256:{'<wbr>'.join(digits[start : start + 16] for start in range(0, len(digits), 16))}</code>"


def _scaled(count: int) -> str:
    """Shorten 12_300_000 to "12.3 M"."""
    value, units = float(count), ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if units[0] else f"{count} "
