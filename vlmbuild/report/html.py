"""One self-contained HTML page about an artifact: no script, no other file, no network; light and dark; by keyboard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmbuild.artifact.output import human_size
from vlmbuild.builder.build import exact_passes
from vlmbuild.checkpoint.source import Progress
from vlmbuild.errors import UsageError
from vlmbuild.ir.cost import region_cost
from vlmbuild.ir.cost_formulas import EVERYDAY, evaluate
from vlmbuild.ir.printer import digest, region_text
from vlmbuild.ir.program import Region
from vlmbuild.measure.pass_parity import GRADIENT_TOLERANCE, TOLERANCE, pass_parity
from vlmbuild.report.charts import bars
from vlmbuild.report.contents import contents
from vlmbuild.report.drawing import draw
from vlmbuild.report.graph_view import ViewNode, view_nodes
from vlmbuild.report.stages import CAPTURED, STORED, Staged, stages_of

_SECTIONS = (
    ("pipeline", "Pipeline"),
    ("charts", "Operators and bytes"),
    ("weights", "Weights and quantization"),
    ("parity", "Parity"),
    ("regions", "Regions"),
    ("manifest", "Manifest"),
)
_MOST_BARS = 16


def page(path: Path, progress: Progress | None = None) -> str:
    """The page's HTML.

    Raises:
        IntegrityError, IncompatibleError: The artifact cannot be read.
        CaptureError: Its model cannot be traced again.
    """
    document = contents(path)
    staged = stages_of(path, progress)
    style = (files("vlmbuild.report") / "style.css").read_text(encoding="utf-8")
    bodies = {
        "pipeline": _pipeline(document, staged),
        "charts": _charts(document, staged),
        "weights": _weights(document),
        "parity": _parity(staged),
        "regions": _regions(staged),
        "manifest": _manifest(document),
    }
    sections = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>'
        f"{''.join(bodies[key])}</section>"
        for key, title in _SECTIONS
    )
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title in _SECTIONS)
    name = escape(document["name"])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{name}</title>'
        f"<style>{style}</style></head>"
        f'<body><header><h1>{name}</h1><p class="soft"><code>{escape(document["id"])}</code></p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{sections}</main></body></html>\n'
    )


def _pipeline(document: Mapping[str, Any], staged: Staged) -> Iterator[str]:
    matches = {record["name"]: record["matches"] for record in document["passes"]}
    source = ", ".join(str(entry.get("uri")) for entry in document["source"])
    steps = [f"source: {source}", f"captured: {', '.join(document['variants'])}"]
    steps += [f"{name}: {count:,} rewritten" for name, count in matches.items()] + [f"target: {document['target']}"]
    yield f'<ol class="pipeline">{"".join(f"<li>{escape(step)}</li>" for step in steps)}</ol>'
    stored, traced = staged.stages[STORED], staged.stages[list(staged.stages)[-2]]
    same = all(
        name in traced.regions and digest(region) == digest(traced.regions[name])
        for name, region in stored.regions.items()
        if not region.recipes
    )
    verdict = "equal to" if same else "different from"
    yield (
        f'<p class="soft">Stages before the last were traced again from the artifact\'s config.json; its own unquantized '
        f"graphs are {verdict} what this vlmbuild compiles.</p>"
    )


def _charts(document: Mapping[str, Any], staged: Staged) -> Iterator[str]:
    program = staged.stages[STORED]
    itemsize = 4 if staged.recipe.dtype == "float32" else 2
    counts = {region["name"]: region["operators"] for region in document["regions"]}
    yield bars(counts, "Operators of each region's graph")
    operators: dict[str, int] = {}
    for region in program.regions.values():
        for name, count in region_cost(region, itemsize).operators.items():
            operators[name] = operators.get(name, 0) + count * len(region.instances)
    top = dict(sorted(operators.items(), key=lambda item: -item[1])[:_MOST_BARS])
    yield bars(top, "Operators of the whole model, the most frequent")
    yield bars({role["role"]: role["bytes"] for role in document["roles"]}, "Bytes of weights by role", "bytes")
    costs = {name: region_cost(region, itemsize) for name, region in program.regions.items()}
    moved = {
        name: int(evaluate(cost.bytes) or 0) * len(program.regions[name].instances) // 2**10
        for name, cost in costs.items()
    }
    yield bars(moved, f"Bytes that all instances of a region move, {EVERYDAY}", "KiB")
    rows = [[name, str(len(program.regions[name].instances)), cost.flops, cost.bytes] for name, cost in costs.items()]
    yield _table(["region", "instances", "FLOPs of one", "bytes moved by one, operator by operator"], rows)


def _weights(document: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [
            role["role"],
            f"{role['parameters']:,}",
            human_size(role["bytes"]),
            "; ".join(f"{form}: {count:,}" for form, count in role["formats"].items()) or document["recipe"]["dtype"],
            "; ".join(role["kept"]),
        ]
        for role in document["roles"]
    ]
    yield _table(["role", "parameters", "stored", "formats", "why the rest keeps its dtype"], rows)
    refusals = [(record["name"], text) for record in document["passes"] for text in record["refusals"]]
    if refusals:
        items = "".join(f"<li><code>{escape(name)}</code>: {escape(text)}</li>" for name, text in refusals)
        yield _folded(f"Left alone, and why ({len(refusals)})", f"<ul>{items}</ul>")
    decisions = [entry for record in document["passes"] for entry in record.get("decisions", ())]
    if decisions:
        rows = [
            [entry["module"], entry["format"] or "kept", entry["reason"], entry.get("error", "")] for entry in decisions
        ]
        table = _table(["linear layer", "format", "why not", "measured error"], rows)
        yield _folded(f"Decisions, layer by layer ({len(decisions)})", table)


def _folded(title: str, body: str, *, opened: bool = False) -> str:
    """A part that opens by click or key."""
    start = "<details open>" if opened else "<details>"
    return f'{start}<summary>{escape(title)}</summary><div class="body">{body}</div></details>'


def _parity(staged: Staged) -> Iterator[str]:
    try:
        parity = pass_parity(
            staged.traced.program,
            staged.traced.family,
            staged.traced.config,
            exact_passes(replace(staged.recipe, attention="auto")),
        )
    except UsageError as error:
        yield f"<p>Not computed: {escape(str(error))}</p>"
        return
    yield (
        "<p>Captured against the graph after each exact pass, forward and gradients, float32, seeded inputs: relative norms "
        f"of the difference, at most {TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e}.</p>"
    )
    rows = [
        [step.name, f"{step.forward:.1e}", f"{step.gradient:.1e}", "equal" if step.holds else "differs"]
        for step in parity.steps
    ]
    yield _table(["after", "forward", "gradient", ""], rows)


def _regions(staged: Staged) -> Iterator[str]:
    yield (
        '<p class="legend"><span class="aten">operator of torch</span><span class="ours">operator of vlmbuild</span>'
        '<span class="edge">input, result</span><span class="changed">new in this stage</span></p>'
        '<p class="soft">Tab goes from node to node; each says its operator, its type and its weights.</p>'
    )
    for name, region in staged.stages[STORED].regions.items():
        stages = staged.regions_of(name)
        many = f" × {len(region.instances)}" if len(region.instances) > 1 else ""
        yield f'<details><summary><h3>{escape(name)}{many}</h3> <span class="soft">{len(stages)} stages</span></summary>'
        yield '<div class="body">'
        before: Sequence[ViewNode] = ()
        for stage, seen in stages.items():
            nodes = view_nodes(seen)
            yield _stage(name, stage, seen, nodes, _new_nodes(before, nodes) if before else frozenset())
            before = nodes
        yield "</div></details>"


def _stage(name: str, stage: str, region: Region, nodes: Sequence[ViewNode], new: frozenset[str]) -> str:
    title = "captured" if stage == CAPTURED else "as stored" if stage == STORED else f"after {stage}"
    drawing = draw(nodes, f"{name}, {title}", new)
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(f"{name}, {title}")}">{drawing}</div>'
    listing = _folded("listing", f'<pre tabindex="0"><code>{escape(region_text(region))}</code></pre>')
    return _folded(f"{title}: {len(nodes)} nodes", scroll + listing, opened=stage == STORED)


def _new_nodes(before: Sequence[ViewNode], after: Sequence[ViewNode]) -> frozenset[str]:
    """Ids of nodes that have no partner of the same operator, type and weights in the stage before."""
    left: dict[tuple[Any, ...], int] = {}
    for node in before:
        left[_kind(node)] = left.get(_kind(node), 0) + 1
    new = set()
    for node in after:
        if left.get(_kind(node), 0):
            left[_kind(node)] -= 1
        else:
            new.add(node.id)
    return frozenset(new)


def _kind(node: ViewNode) -> tuple[Any, ...]:
    return node.operator, node.type, node.weights


def _manifest(document: Mapping[str, Any]) -> Iterator[str]:
    tools = ", ".join(f"{tool} {version}" for tool, version in sorted(document["toolchain"].items()))
    yield f"<p>Built with {escape(tools)}.</p>"
    recipe = [[key, str(value)] for key, value in document["recipe"].items()]
    yield _table(["recipe", ""], recipe)
    rows = [[entry["path"], entry["role"], human_size(entry["bytes"])] for entry in document["files"]]
    yield _table(["file", "role", "size"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
