"""Parity within one run: captured = after each exact pass = after all of them, forward and gradients, on seeded inputs.

Stored numbers would drift with torch; here both sides are computed in the same process, in float32, from the config alone.
It runs on the CPU, where attention is SDPA whatever the recipe says; the Triton kernels have parity tests of their own.
Every region runs once, with random weights at its full width: a repeated block that would only repeat it hands its
activations on. The first pass after which values differ is the one to blame.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.ir.dims import evaluate_shape, shape_names
from vlmbuild.ir.interpret import run_calls
from vlmbuild.ir.program import Call, Input, Program, Region, Slot, Variant, join
from vlmbuild.rewrite.pass_manager import Pass, run
from vlmbuild.runtime.torch.region import BoundRegion

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
"""Relative norms, float32: exact passes change the order of summation at most. With random weights the gradients of queries
and keys cancel to a ten-thousandth of the others, and are rounded accordingly; a broken pass is off by percents."""

_CANCELLED = 1e-4
"""Share of the norm of all values below which a gradient counts as this much."""

_SIZES = (6, 5, 7, 8, 9, 10)
_LARGEST_BYTES = 8 * 2**30


@dataclass(frozen=True, slots=True)
class Step:
    """Errors against the captured graph after a pass: relative norms, the largest of all variants and tensors."""

    name: str
    forward: float
    gradient: float

    @property
    def holds(self) -> bool:
        """True if values are the same."""
        return self.forward <= TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


@dataclass(frozen=True, slots=True)
class Parity:
    """One step a pass, in order.

    Attributes:
        steps: Errors after each pass.
        refused: Why nothing was, or "".
    """

    steps: tuple[Step, ...]
    refused: str = ""

    @property
    def broken_by(self) -> str:
        """The first pass that changes values, or ""."""
        return next((step.name for step in self.steps if not step.holds), "")

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        steps = [{"pass": step.name, "forward": step.forward, "gradient": step.gradient} for step in self.steps]
        return {"steps": steps, "broken_by": self.broken_by, "refused": self.refused}


def pass_parity(program: Program, family: Family, config: Any, passes: Sequence[Pass]) -> Parity:
    """Run a captured program after each of some exact passes. `program` stays as it is.

    Raises:
        UsageError: Its regions take more memory than a check may.
    """
    program = copy.deepcopy(program)
    _check_size(program)
    constants = family.constants(config)
    expected = _values(program, constants)
    norms = (value.square().sum().item() for values in expected for value in values.values())
    floor = _CANCELLED * math.sqrt(sum(norms))
    steps = []
    for step in passes:
        run([step], program)
        actual = _values(program, constants)
        forward, gradient = (
            max(_error(got.get(name), value, floor) for name, value in want.items())
            for got, want in zip(actual, expected, strict=True)
        )
        steps.append(Step(step.name, forward, gradient))
    return Parity(tuple(steps))


def parity_lines(name: str, parity: Parity) -> list[str]:
    """Format parity as a table."""
    if parity.refused:
        return [f"{name}: parity was not computed: {parity.refused}"]
    limits = f"(at most {TOLERANCE:.0e}, gradients {GRADIENT_TOLERANCE:.0e})"
    lines = [f"{name}: captured = after each exact pass, float32,", f"  relative errors {limits}"]
    lines += [f"  {step.name:<20} forward {step.forward:.1e}  gradient {step.gradient:.1e}" for step in parity.steps]
    verdict = f"broken by {parity.broken_by}" if parity.broken_by else "all equal"
    return [*lines, f"  {verdict}"]


def _check_size(program: Program) -> None:
    """Refuse a program whose weights and gradients, of one instance per region, do not fit the limit."""
    count = sum(math.prod(slot.shape) for region in program.regions.values() for slot in region.slots)
    if 8 * count > _LARGEST_BYTES:
        raise UsageError(
            f"--bisect runs one block of each kind at full width, which takes {8 * count / 2**30:.0f} GiB for this model; "
            f"the limit is {_LARGEST_BYTES / 2**30:.0f}. Bisect with a smaller model of the family: passes are the same."
        )


def _values(program: Program, constants: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the logits of every variant, and the gradients of all its weights."""
    all_logits: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for name, variant in program.variants.items():
        weights: dict[str, Tensor] = {}
        logits = _forward(program, variant, constants, weights)
        seed = _random(f"gradient {name}", tuple(logits.shape))
        trained = {key: weight for key, weight in weights.items() if weight.requires_grad}
        grads = torch.autograd.grad(logits, list(trained.values()), seed, allow_unused=True)
        all_logits[name] = logits.detach()
        gradients |= {f"{name} {key}": grad for key, grad in zip(trained, grads, strict=True) if grad is not None}
    return all_logits, gradients


def _forward(program: Program, variant: Variant, constants: Mapping[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    names = shape_names(entry.shape for entry in variant.inputs)
    if len(names) > len(_SIZES):
        raise UsageError(
            f"The variant has {len(names)} dynamic dimensions ({', '.join(names)}); --bisect knows sizes for {len(_SIZES)}. "
            "Run without --bisect."
        )
    sizes = dict(zip(names, _SIZES[: len(names)], strict=True))
    values = {entry.name: _input(entry, sizes) for entry in variant.inputs}
    graphs = {name: _runnable(region) for name, region in program.regions.items()}
    first: dict[str, Call] = {}

    def run_call(call: Call, activations: tuple[Tensor, ...]) -> Sequence[Tensor]:
        index = _handed_on(first.setdefault(call.region, call), call)
        if index is not None:
            return [activations[index]]
        slots = program.regions[call.region].slots
        held = [_weight(join(call.instance, slot.name), slot, constants, weights) for slot in slots]
        results: tuple[Tensor, ...] = graphs[call.region](*held, *activations)
        return results

    run_calls(variant.calls, values, run_call)
    return values[variant.output]


def _runnable(region: Region) -> GraphModule:
    """Make a region runnable in float32 on the CPU: remove assertions, and replace the device of tracing."""
    graph = BoundRegion(region, torch.float32, ()).graph
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
        node.args = tuple(
            torch.device("cpu") if isinstance(argument, torch.device) else argument for argument in node.args
        )
    graph.recompile()
    return graph


def _handed_on(first: Call, call: Call) -> int | None:
    """Return the index of the activation that replaces a repeated call's result: the only one that the first call did not
    have."""
    changed = [index for index, name in enumerate(call.inputs) if name != first.inputs[index]]
    return changed[0] if len(changed) == 1 and len(call.outputs) == 1 else None


def _weight(name: str, slot: Slot, constants: Mapping[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    if slot.kind == "constant":
        return constants[name]
    if name not in weights:
        scale = math.prod(slot.shape[1:]) ** -0.5 if len(slot.shape) > 1 else 0.5
        weights[name] = (_random(name, slot.shape) * scale).requires_grad_()
    return weights[name]


def _input(entry: Input, sizes: Mapping[str, int]) -> Tensor:
    """Draw seeded values that any model takes: small indices, and segments of which one is long and some are empty."""
    shape = evaluate_shape(entry.shape, sizes)
    if entry.dtype.is_floating_point:
        return _random(entry.name, shape)
    if entry.name.endswith("cu_seqlens"):
        return torch.tensor([0, *[2] * (shape[0] - 2), min(_SIZES)], dtype=entry.dtype)
    generator = torch.Generator().manual_seed(_seed(entry.name))
    values = torch.randint(0, 2, shape, generator=generator)
    if entry.dtype == torch.bool and values.dim() > 1:
        values[..., 0] = 1  # every query sees something
    return values.to(entry.dtype)


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(_seed(name)))


def _seed(name: str) -> int:
    """Derive a seed from a name: the same in every process, whatever else is drawn."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])


def _error(actual: Tensor | None, expected: Tensor, floor: float) -> float:
    """Compute the relative norm of the difference; a gradient that nearly cancels is compared with `floor`.

    Values that are not finite give infinity, since comparisons would pass over NaN.
    """
    difference = expected if actual is None else actual - expected  # a gradient that is gone is zero
    error = float(difference.norm().item() / max(expected.norm().item(), floor))
    return error if math.isfinite(error) else math.inf
