"""One self-contained page about an artifact: no script, no other file, no network; light and dark; narrow and wide.

`page.html` lays it out and `style.css` styles it; here are the values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from vlmbuild.artifact.output import human_size
from vlmbuild.builder.passes import exact_passes
from vlmbuild.errors import UsageError
from vlmbuild.ir.cost import region_cost
from vlmbuild.ir.dims import EVERYDAY, everyday_value
from vlmbuild.ir.printer import digest, region_text
from vlmbuild.ir.program import Region
from vlmbuild.locks.listing_difference import is_equal, side_by_side
from vlmbuild.measure.pass_parity import GRADIENT_TOLERANCE, TOLERANCE, pass_parity
from vlmbuild.report.contents import contents
from vlmbuild.report.stages import STORED, Staged, stages_of
from vlmbuild.util.progress import Progress, silent

_LAYER = re.compile(r"\.(\d+)\.")


def page(path: Path, progress: Progress | None = None) -> str:
    """Render the page.

    Raises:
        IntegrityError, IncompatibleError: The artifact cannot be read.
        CaptureError: Its model cannot be traced again.
    """
    document = contents(path)
    staged = stages_of(path, progress)
    folder = files("vlmbuild.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"breakable": _breakable, "code": _code, "size": human_size}
    environment.tests["equal"] = lambda pair: is_equal(*pair)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    tools = ", ".join(f"{tool} {version}" for tool, version in sorted(document["toolchain"].items()))
    return template.render(
        document=document,
        style=(folder / "style.css").read_text(encoding="utf-8"),
        everyday=EVERYDAY,
        roles=_map(document, staged),
        same=_same(staged),
        stages=list(_stages(document, staged)),
        decisions=_decisions(document),
        **_parity(staged, progress or silent),
        numerics=_numerics(document["numerics"]),
        recipe=_recipe(document["recipe"]),
        sources=", ".join(str(entry.get("uri")) for entry in document["source"]),
        tools=tools,
        files=[[entry["path"], entry["role"], human_size(entry["bytes"])] for entry in document["files"]],
    )


def _map(document: Mapping[str, Any], staged: Staged) -> dict[str, list[dict[str, Any]]]:
    """Return a box per region by role, with its share of the bytes."""
    stored = {region["name"]: region for region in document["regions"]}
    total = sum(region["bytes"] for region in stored.values())
    boxes: dict[str, list[dict[str, Any]]] = {}
    for region in staged.stages[STORED].regions.values():
        roles = Counter(slot.role for slot in region.slots)
        size, count = stored[region.name]["bytes"], stored[region.name]["stored_parameters"]
        share = round(100 * size / total) if total else 0
        facts = "weights shared with another region"
        if count:
            facts = f"{8 * size / count:.1f} bits, {human_size(size)}, {share or 'under 1'} %"
        flops = everyday_value(region_cost(region, 4 if staged.recipe.dtype == "float32" else 2).flops)
        work = "" if flops is None else f"{_scaled(int(flops) * len(region.instances))}FLOPs"
        box = {"name": _title(region), "share": share, "facts": facts, "work": work}
        boxes.setdefault(roles.most_common(1)[0][0] if roles else "other", []).append(box)
    return boxes


def _same(staged: Staged) -> bool:
    """Return whether the unquantized graphs that were traced again are those in the artifact."""
    traced = staged.stages[list(staged.stages)[-2]]
    return all(
        name in traced.regions and digest(region) == digest(traced.regions[name])
        for name, region in staged.stages[STORED].regions.items()
        if not region.recipes
    )


def _stages(document: Mapping[str, Any], staged: Staged) -> Iterator[dict[str, Any]]:
    """Yield the effect of each pass: listings before and after, side by side."""
    records = {record["name"]: record for record in document["passes"]}
    for stage, changes in staged.changes():
        names = [name for name in records if name not in staged.stages] if stage == STORED else [stage]
        known = [records[name] for name in names if name in records]
        yield {
            "title": ", ".join(f"{record['name']}: {record['matches']:,} rewritten" for record in known) or stage,
            "refusals": [refusal for record in known for refusal in record["refusals"]],
            "changes": [
                (_title(after), side_by_side(region_text(before), region_text(after))) for before, after in changes
            ],
        }


def _decisions(document: Mapping[str, Any]) -> list[list[str]]:
    """Return a row per decision; layers with the same one share it."""
    rows: dict[tuple[str, str, str], tuple[list[int], list[float]]] = {}
    for record in document["passes"]:
        for entry in record.get("decisions", ()):
            number = _LAYER.search(entry["module"])
            module = _LAYER.sub(".*.", entry["module"], count=1)
            layers, errors = rows.setdefault((module, entry["format"], entry["reason"]), ([], []))
            layers += [int(number[1])] if number else []
            errors += [float(entry["error"])] if entry.get("error") else []
    dtype = document["recipe"]["dtype"]
    return [
        [module, _ranges(layers), form or dtype, f"{max(errors):.1e}" if errors else "", reason]
        for (module, form, reason), (layers, errors) in rows.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Shorten [0, 1, 2, 5] to "0–2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _parity(staged: Staged, progress: Progress) -> dict[str, Any]:
    """Compute the parity of exact passes, or the reason why it is not computed."""
    traced = staged.traced
    passes = exact_passes(replace(staged.recipe, attention="auto"))
    steps, refused = [], ""
    progress("parity", 0, 1)
    try:
        for step in pass_parity(traced.program, traced.family, traced.config, passes).steps:
            errors = (f"{value:.1e}" if value else "0" for value in (step.forward, step.gradient))
            steps.append([step.name, *errors, "equal" if step.holds else "differs"])
    except UsageError as error:
        refused = str(error)
    progress("parity", 1, 1)
    return {
        "steps": steps,
        "refused": refused,
        "tolerances": f"{TOLERANCE:.0e} forward and {GRADIENT_TOLERANCE:.0e}",
    }


def _numerics(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the heads and rows of what the build measured."""
    heads = list(dict.fromkeys(key for record in records for key in record))
    return [heads, *([str(record.get(head, "")) for head in heads] for record in records)] if records else []


def _recipe(recipe: Mapping[str, Any]) -> list[list[str]]:
    spec = recipe.get("quantize") or {}
    options = {key: value for key, value in recipe.items() if key != "quantize" or value is None}
    return [[key, _value(value)] for key, value in (options | {f"quantize.{k}": v for k, v in spec.items()}).items()]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['pattern']}={value['format']}"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def _title(region: Region) -> str:
    return region.name + (f" × {len(region.instances)}" if len(region.instances) > 1 else "")


def _breakable(text: str) -> Markup:
    """Escape text, and allow line breaks after dots, slashes and brackets between words."""
    return Markup(re.sub(r"(?<=[A-Za-z_*])([./(])(?=[\w*%])", r"\1<wbr>", str(escape(text))))  # noqa: S704  # escaped


def _code(text: str | None) -> Markup:
    """Escape a line of a listing, and allow line breaks before arguments."""
    return Markup(str(escape(text or "")).replace("(", "(<wbr>"))  # noqa: S704  # escaped


def _scaled(count: int) -> str:
    """Shorten 12_300_000 to "12.3 M"."""
    value, units = float(count), ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if units[0] else f"{count} "
