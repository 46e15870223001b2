"""Which linear layers and embeddings are quantized, and how: decided by their role in the model, and by patterns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.linear_layers import LinearLayer, embeddings, linear_layers
from vlmbuild.ir.program import Program
from vlmbuild.ops import PLAIN_LINEAR
from vlmbuild.quant.spec import QuantSpec, role_names


@dataclass(frozen=True, slots=True)
class Decision:
    """How the weight of a linear layer, or of embeddings, is stored.

    Attributes:
        format: None keeps the dtype.
        reason: Why it keeps the dtype, or has other options than were asked for; "" for others.
        pinned: A pattern of the user's decided, so that no measurement may.
        lookups: True if it holds for lookups of rows too.
        error: Error of quantization (`vlmbuild.measure.sensitivity`), if it was measured.
    """

    format: WeightFormat | None
    reason: str = ""
    error: float | None = None
    pinned: bool = False
    lookups: bool = False

    def record(self, module: str) -> dict[str, str]:
        """Return plain values, as the manifest has them."""
        record = {"module": module, "format": self.format.describe() if self.format else "", "reason": self.reason}
        return record if self.error is None else {**record, "error": f"{self.error:.2e}"}


def decide(
    program: Program,
    spec: QuantSpec | None,
    *,
    stored: Mapping[str, WeightFormat] | None = None,
    published: Callable[[str], str] = str,
) -> dict[str, Decision]:
    """Decide the format of every linear layer of a program, by module name; and of embeddings, if they are asked for.

    Args:
        program: Program before quantization.
        spec: Requested quantization; None leaves everything as the source has it.
        stored: Formats of the layers that are quantized in the source.
        published: Other name of a module, which patterns may match too.

    Raises:
        UsageError: A pattern matches no linear layer.
        SourceError: A layer is quantized already, and another format is requested.
    """
    stored = stored or {}
    tables = embeddings(program)
    asked = tables if spec is not None and "embedding" in role_names(spec.roles) else {}
    linears = {layer.module: layer for layer in linear_layers(program, (PLAIN_LINEAR,))}
    layers = [*linears.values(), *(layer for module, layer in asked.items() if module not in linears)]
    names = {layer.module: (layer.module, published(layer.module)) for layer in layers}
    hits = {} if spec is None else _hits(spec, names)
    decisions = {}
    for layer in layers:
        kept = stored.get(layer.module)
        if spec is None:
            decision = Decision(kept, "" if kept else "not quantized in the source")
        elif layer.module in asked:
            decision = _decide_embeddings(tables[layer.module], spec, hits[layer.module], layer.module in linears)
        elif layer.shared and layer.module in tables:
            decision = Decision(None, _tied_reason(spec))
        else:
            decision = _decide(layer, spec, hits[layer.module], kept)
        if kept is not None and decision.format not in (None, kept):
            raise SourceError(
                f"{layer.module} is quantized already ({kept.describe()}), and {decision.format.describe()} is asked for; "
                "rounding twice loses more than once. Build from the unquantized checkpoint, leave the format out to keep "
                "the source's, or dequantize first with --quantize none."
            )
        decisions[layer.module] = decision if decision.format == kept else _fitted(decision, layer)
    return decisions


def _hits(spec: QuantSpec, names: Mapping[str, tuple[str, str]]) -> dict[str, set[str]]:
    """Return module -> the patterns that match one of its names. Raises UsageError for a pattern that matches none."""
    hits: dict[str, set[str]] = {module: set() for module in names}
    for pattern in (*spec.skip, *(item.pattern for item in spec.overrides)):
        matches = [module for module, both in names.items() if any(fnmatchcase(name, pattern) for name in both)]
        if not matches:
            raise UsageError(
                f"The pattern {pattern!r} matches no linear layer. Patterns match module names, for example "
                f"{next(iter(names), '*.o_proj')!r} or '*.self_attn.o_proj'."
            )
        for module in matches:
            hits[module].add(pattern)
    return hits


def _decide(layer: LinearLayer, spec: QuantSpec, hits: set[str], kept: WeightFormat | None) -> Decision:
    """Apply the first rule that matches: impossible formats, the user's patterns, the role, the source."""
    if layer.shared:
        return Decision(None, "its weight is used elsewhere too")
    if hits.intersection(spec.skip):
        return Decision(None, "in the skip list")
    override = next((item for item in spec.overrides if item.pattern in hits), None)
    if override is not None:
        form = override.weight_format()
        return Decision(form, "" if form else "kept by an override", pinned=True)
    if spec.format == "source":
        return Decision(kept, "" if kept else "not quantized in the source")
    if spec.format == "none":
        return Decision(None, "nothing is to be quantized")
    form = spec.role_format(layer.role)
    if form is None:
        return Decision(kept, "" if kept else f"role {layer.role} keeps its dtype")
    if problem := form.refusal(layer.shape):
        return Decision(None, problem)
    return Decision(form)


def _fitted(decision: Decision, layer: LinearLayer) -> Decision:
    """Give the format the options that suit the layer's shape; a layer that has none keeps its dtype."""
    if decision.format is None:
        return decision
    form = decision.format.fitted(layer.shape)
    if form == decision.format:
        return decision
    return replace(
        decision, format=form, reason=f"rows of {layer.shape[1]} do not divide into {decision.format.describe()}"
    )


def _decide_embeddings(layer: LinearLayer, spec: QuantSpec, hits: set[str], tied: bool) -> Decision:
    """Decide about embeddings that are asked for; a tied head uses the same weight, and so the same format."""
    decision = replace(_decide(layer, spec, hits, None), lookups=True)
    form = decision.format
    problem = ""
    if form is None:
        return decision
    if tied and not decision.pinned and spec.role_format("head") != form:
        problem = "the head uses the weight too, and its role is not asked for in the same format"
    elif not form.looked_up:
        problem = f"{form.name} has no form for embeddings"
    return replace(decision, format=None, reason=problem) if problem else decision


def _tied_reason(spec: QuantSpec) -> str:
    """Say why a head that is tied to embeddings keeps its dtype where these are not asked for."""
    form = spec.role_format("head")
    if form is None or "trainable" in form.targets or not form.looked_up:
        return "its weight is used elsewhere too"
    return "the embeddings use the weight too, and their role is not asked for"
