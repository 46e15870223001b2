"""Blocks of image tokens, found in a model as on the host."""

import numpy as np
import onnxruntime
import pytest
import torch

from vlmbuild.families.gemma3.prepare import lookahead
from vlmbuild.targets.onnx.blocks import run_lookahead
from vlmbuild.targets.onnx.graph_builder import GraphBuilder


@pytest.fixture(scope="module")
def opened():
    builder = GraphBuilder(torch.float32)
    marks = builder.take_input("marks", torch.float32, ["batch", "tokens"])
    builder.give_output("lookahead", run_lookahead(builder, marks), torch.int64, [None])
    model = builder.model("blocks").SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "rows",
    ["0", "1", "0000", "1111", "0110 1011", "1110 1001", "0001 1000", "010 111 000"],
)
def test_runs_end_with_their_row(rows, opened):
    marks = np.array([[int(mark) for mark in row] for row in rows.split()], np.float32)
    (found,) = opened.run(None, {"marks": marks})
    flat = torch.from_numpy(marks).flatten()
    assert found.tolist() == lookahead(flat == 1, torch.arange(len(flat)), marks.shape[1]).tolist()
