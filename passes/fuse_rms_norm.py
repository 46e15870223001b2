"""Fuse RMS normalization, for targets that have an operator for it.

Inductor needs no such operator, nor a kernel that adds first: for a GPU it generates one kernel of `x + y` and its
normalization, which reads both once, writes the sum and the result, and reads the sum again from cache. In 16 bits that is 8
bytes of memory for each value, the least there can be (seen in the code that torch 2.13 generates; not timed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.fx import Node

from vlmbuild.ir.program import COMPUTE_DTYPE, Program, Region
from vlmbuild.rewrite.pass_manager import PassOutcome

aten = torch.ops.aten


class _Site(NamedTuple):
    states: Node
    weight: Node
    epsilon: float
    result: Node


@dataclass(frozen=True, slots=True)
class FuseRmsNorm:
    """Fuse RMS normalization (arXiv:1910.07467).

    Before: wide = to(x, f32)                                         After: y = rms_norm(x, [width], weight, eps)
            mean = mean(pow(wide, 2), [-1])
            y = weight * to(wide * rsqrt(mean + eps), compute)

    Legal because the operator is defined as just that, in float32 within.
    """

    name: ClassVar[str] = "fuse_rms_norm"
    exact: ClassVar[bool] = True

    def __call__(self, program: Program) -> PassOutcome:
        outcome = PassOutcome()
        for name, region in program.regions.items():
            for site in list(_sites(region)):
                graph = region.graph.graph
                shape = list(site.weight.meta["val"].shape)
                with graph.inserting_before(site.result):
                    fused = graph.call_function(aten.rms_norm.default, (site.states, shape, site.weight, site.epsilon))
                site.result.replace_all_uses_with(fused)
                graph.eliminate_dead_code()
                outcome.add(name, 1)
        return outcome


def _sites(region: Region) -> Iterator[_Site]:
    for node in region.graph.graph.nodes:
        if node.target is aten.rsqrt.default and (site := _site(node)) is not None:
            yield site


def _site(root: Node) -> _Site | None:
    """Match a norm around its reciprocal root: backwards to the states, forwards to the product with the weight."""
    epsilon = _call(root.args[0], aten.add.Tensor)
    mean = epsilon and _call(epsilon.args[0], aten.mean.dim)
    square = mean and _call(mean.args[0], aten.pow.Tensor_Scalar)
    wide = square and _call(square.args[0], aten.to.dtype)
    scaled = _only_user(root, aten.mul.Tensor)
    narrow = scaled and _only_user(scaled, aten.to.dtype)
    result = narrow and _only_user(narrow, aten.mul.Tensor)
    if not (epsilon and mean and square and wide and scaled and narrow and result):
        return None
    axes: Any = mean.args[1]
    literals = (square.args[1], list(axes), mean.args[2:], narrow.args[1:])
    weight: Any = result.args[0]
    if literals != (2, [-1], (True,), (COMPUTE_DTYPE,)) or scaled.args != (wide, root) or result.args[1] is not narrow:
        return None
    states: Any = wide.args[0]
    if weight.meta["val"].shape != states.meta["val"].shape[-1:]:
        return None
    return _Site(states, weight, float(epsilon.args[1]), result)  # type: ignore[arg-type]


def _call(value: Any, target: Any) -> Node | None:
    return value if isinstance(value, Node) and value.target is target else None


def _only_user(node: Node, target: Any) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target else None
