"""Kinds of artifacts, by the recipe's `target`.

A new one is a folder here with its writer, a row in `TARGETS` below, and a row in each table of facts that lower folders
need: `vlmbuild.recipe.TARGET_OPTIONS` (the options of its recipes) and `vlmbuild.runtime.load.OPENERS` (how it is loaded).
"""

from __future__ import annotations

from contextlib import nullcontext

from vlmbuild.errors import IncompatibleError
from vlmbuild.measure.aoti_parity import code_measurement
from vlmbuild.measure.onnx_parity import onnx_measurement
from vlmbuild.targets import aoti, onnx, trainable
from vlmbuild.targets.base import Target, Write
from vlmbuild.targets.request import Request

TARGETS: dict[str, Target] = {
    "trainable": Target(
        begin=lambda: nullcontext(trainable.write),
        stored_parameters=trainable.stored_parameters,
    ),
    "onnx": Target(
        begin=onnx.writing,
        measurement=onnx_measurement,
    ),
    "aoti": Target(
        begin=aoti.writing,
        measurement=code_measurement,
        devices=("cpu",),
    ),
}


def target_named(name: str) -> Target:
    """Return the row of a manifest's target. Raises IncompatibleError when this vlmbuild does not know it."""
    if name not in TARGETS:
        raise IncompatibleError(
            f"Unknown target {name!r}; this vlmbuild knows {', '.join(TARGETS)}. Install one that knows it."
        )
    return TARGETS[name]


__all__ = ["TARGETS", "Request", "Target", "Write", "target_named"]
