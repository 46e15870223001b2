"""Run passes over a program, with everything that a pass must not do itself: checking, simplifying, counting, timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from vlmbuild.errors import CaptureError, PassError
from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import Geometry, Program, Region
from vlmbuild.rewrite.pattern import Rewrite
from vlmbuild.util.gc_paused import gc_paused

_Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]
"""Target, arguments, keywords, value."""


@dataclass(slots=True)
class PassOutcome:
    """The outcome of one pass.

    Attributes:
        sites: Region name -> rewritten sites of its graph (not multiplied by instances).
        refusals: Region name -> reasons why similar sites were left alone.
        origins: Name of a new region -> the region that its instances were split from.
    """

    sites: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, list[str]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def add(self, region: str, sites: int, refusals: Iterable[str] = ()) -> None:
        """Add sites and reasons of a region."""
        if sites:
            self.sites[region] = self.sites.get(region, 0) + sites
        for reason in refusals:
            self.refusals.setdefault(region, []).append(reason)

    def add_part(self, part: str, region: str) -> None:
        """Record the region that a part was split from; a region that was not split is its own part."""
        if part != region:
            self.origins[part] = region


@runtime_checkable
class Pass(Protocol):
    """A graph rewrite: a frozen dataclass whose fields are its options.

    A pass changes the regions of a program in place and returns its outcome. It sees the whole program, because a rewrite
    may hold in one region only when it holds in its callers, but it must not know the model family. A second run finds
    nothing. `exact` promises the same values (bit-identical or within 1e-6 in float32), forward and backward.
    """

    @property
    def name(self) -> str:
        """The name in reports, manifests and `--require`."""

    @property
    def exact(self) -> bool:
        """True if values stay the same."""

    def __call__(self, program: Program) -> PassOutcome:
        """Rewrite in place."""


@runtime_checkable
class PatternPass(Protocol):
    """A pass with patterns, so that a report can say why it found nothing."""

    @property
    def name(self) -> str:
        """The name of the pass."""

    def rewrites(self, geometry: Geometry) -> tuple[Rewrite, ...]:
        """Return the rewrites for a model of this geometry."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """A pass's outcome, with the measurements of the runner.

    Attributes:
        name: The pass.
        exact: True if it keeps values.
        sites: Region name -> rewritten sites of its graph.
        matches: Sites in the whole model; a region's sites count once per instance.
        refusals: "region: reason" for similar sites that were left alone.
        seconds: Duration.
    """

    name: str
    exact: bool
    sites: dict[str, int]
    matches: int
    refusals: tuple[str, ...]
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return the part that is the same in every run, for the manifest."""
        return {"name": self.name, "matches": self.matches, "refusals": list(self.refusals)}


@gc_paused()
def run(
    passes: Iterable[Pass],
    program: Program,
    *,
    require: Iterable[str] = (),
    before: Iterable[PassReport] = (),
    on_pass: Callable[[PassReport], None] | None = None,
) -> tuple[PassReport, ...]:
    """Run passes in order and check the contract of each.

    Args:
        passes: Passes in order.
        program: Changed in place.
        require: Names of passes that must rewrite at least one site.
        before: Reports of passes that ran earlier, for messages.
        on_pass: Called after each pass.

    Raises:
        CaptureError: The model calls an operator that an artifact may not hold.
        PassError: A pass failed, left an invalid graph, changed a region it did not count or counted one it did not
            change, or a required pass matched nothing (or does not exist in this pipeline).
    """
    passes = tuple(passes)
    check_required(passes, require)
    reports: list[PassReport] = []
    for step in passes:
        report = _run_one(step, program, [*before, *reports])
        if step.name in require and not report.matches:
            reasons = "; ".join(report.refusals)
            raise PassError(
                f"Required pass {step.name} matched nothing{f' ({reasons})' if reasons else ''}. The model's graph has "
                "another form than the pass knows; check the transformers version, or drop the requirement."
            )
        reports.append(report)
        if on_pass is not None:
            on_pass(report)
    return tuple(reports)


def check_required(passes: Iterable[Pass], require: Iterable[str]) -> None:
    """Raise PassError for a required pass that is not among `passes`."""
    known = [step.name for step in passes]
    if unknown := sorted(set(require) - set(known)):
        raise PassError(
            f"Required pass {unknown[0]!r} is not part of this build. Require one of its passes: {', '.join(known)}."
        )


def _run_one(step: Pass, program: Program, before: list[PassReport]) -> PassReport:
    states = {name: _state(region) for name, region in program.regions.items()}
    known = {name: _calls(region) for name, region in program.regions.items()}
    started = time.perf_counter()
    try:
        outcome = step(program)
        for name, region in program.regions.items():
            if _state(region) != states.get(name):  # shapes are part of the text, so the others' are still right
                refresh(region, known.get(name, {}))
    except CaptureError:
        raise  # the model is at fault, not the pass
    except Exception as error:
        done = ", ".join(report.name for report in before) or "none"
        raise PassError(f"Pass {step.name} failed (passes already run: {done}): {error}") from error
    seconds = time.perf_counter() - started
    origins = {name: outcome.origins.get(name, name) for name in program.regions}
    changed = {name for name, region in program.regions.items() if _state(region) != states.get(origins[name])}
    counted = {name for name, sites in outcome.sites.items() if sites}
    if changed != counted:
        raise PassError(
            f"Pass {step.name} breaks its contract: it changed {sorted(changed) or 'nothing'} "
            f"but counted {sorted(counted) or 'nothing'}."
        )
    matches = sum(sites * len(program.regions[name].instances) for name, sites in outcome.sites.items())
    refusals = tuple(f"{region}: {reason}" for region, reasons in outcome.refusals.items() for reason in reasons)
    return PassReport(step.name, step.exact, outcome.sites, matches, refusals, seconds)


def _state(region: Region) -> tuple[str, int]:
    """Return the state that a pass may change: the digest, and the number of nodes (assertions are not part of the
    dataflow)."""
    return digest(region), len(region.graph.graph.nodes)


def _calls(region: Region) -> dict[Node, _Call]:
    """Return what determines each node's value, beside the values of its arguments."""
    return {node: (node.target, node.args, node.kwargs, node.meta.get("val")) for node in region.graph.graph.nodes}


def refresh(region: Region, known: Mapping[Node, _Call] = MappingProxyType({})) -> None:
    """Drop dead nodes, check the graph, recompile its code, and recompute the shapes that rewriting made stale (graphs of
    a loaded artifact have none).

    Args:
        region: A region that was rewritten.
        known: Calls before, whose values are right where nothing has changed.
    """
    graph = region.graph.graph
    graph.eliminate_dead_code()
    graph.lint()
    region.graph.recompile()
    values = [node.meta.get("val") for node in region.placeholders()]
    mode = detect_fake_mode(values)
    if mode is not None:
        # Without Python's dispatcher torch 2.11 makes some sizes constant: its C++ linear asks for them as integers.
        with torch.no_grad(), enable_python_dispatcher():
            _StaleValues(region, mode, known).propagate_dont_convert_inputs(*values)


class _StaleValues(FakeTensorProp):
    """Computes the values of nodes that are new, or whose call or arguments have changed."""

    def __init__(self, region: Region, mode: FakeTensorMode, known: Mapping[Node, _Call]) -> None:
        super().__init__(region.graph, mode)
        calls = _calls(region)
        self._current = {node for node, call in known.items() if _same_call(call, calls.get(node))}
        self._current -= {node for node in known if "val" not in node.meta}

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and n in self._current and self._current.issuperset(n.all_input_nodes):
            return n.meta["val"]
        before = n.meta.get("val")
        result = super().run_node(n)
        if n in self._current and not _same_layout(before, n.meta.get("val")):
            self._current.remove(n)
        return result


def _same_call(one: _Call, other: _Call | None) -> bool:
    return other is not None and one[:3] == other[:3] and one[3] is other[3]


def _same_layout(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    layouts = [(value.dtype, str(value.shape), str(value.stride())) for value in (one, other)]
    return layouts[0] == layouts[1]
