"""Blocks of image tokens that see each other both ways, for clients that say nothing of them."""

from __future__ import annotations

import torch

from vlmbuild.targets.onnx.graph_builder import GraphBuilder

LOOKAHEAD = "lookahead"
"""Name of the program's input."""


def run_lookahead(builder: GraphBuilder, marks: str) -> str:
    """Count the tokens after each in its run of marked tokens: marks (batch, tokens), one or zero -> int64 (batch * tokens,).

    Runs end with their row. Their ends are listed in order, so that the number of a token's run finds the end of it.
    """
    shown, one = builder.cast(marks, torch.int64), builder.constant(1)
    inner = builder.op("Slice", shown, builder.constant([0]), builder.constant([-1]), builder.constant([1]))
    before = builder.op("Pad", inner, builder.constant([0, 1, 0, 0]))
    inner = builder.op("Slice", shown, builder.constant([1]), builder.constant([2**63 - 1]), builder.constant([1]))
    after = builder.op("Pad", inner, builder.constant([0, 0, 0, 1]))
    starts, ends = (builder.op("Mul", shown, builder.op("Sub", one, other)) for other in (before, after))
    shown, starts, ends = (builder.reshape(value, [-1]) for value in (shown, starts, ends))
    last = builder.op("Concat", builder.reshape(builder.op("NonZero", ends), [-1]), builder.constant([0]), axis=0)
    # Before the first run the number is -1, which gathers the zero.
    number = builder.op("Sub", builder.op("CumSum", starts, builder.constant(0)), one)
    index = builder.op("Range", builder.constant(0), builder.op("Squeeze", builder.size(shown, 0)), one)
    return str(builder.op("Mul", builder.op("Sub", builder.op("Gather", last, number), index), shown))
