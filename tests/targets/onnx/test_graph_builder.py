"""Nodes that the graph builder drops: unused ones, reshapes of reshapes, copies of outputs."""

import numpy as np
import onnxruntime
import torch

from vlmbuild.targets.onnx.graph_builder import GraphBuilder


def operators(builder):
    return [node.op_type for node in builder.graph("g").node]


def run(builder, **values):
    model = builder.model("m").SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, values)


def test_views_of_views_are_one_and_what_nothing_reads_is_left_out():
    builder = GraphBuilder(torch.float32)
    x = builder.take_input("x", torch.float32, ["rows", 6])
    flat = builder.reshape(x, [-1])
    raised = builder.op("Unsqueeze", flat, builder.constant([0]))
    builder.op("Neg", raised)
    builder.give_output("y", builder.reshape(raised, [-1, 3]), torch.float32, ["more", 3])
    assert operators(builder) == ["Reshape"]
    given = np.arange(12, dtype=np.float32).reshape(2, 6)
    assert (run(builder, x=given)[0] == given.reshape(4, 3)).all()
    constants = {tensor.name for tensor in builder.graph("g").initializer}
    assert len(constants) == 1


def test_a_size_that_is_copied_is_that_of_the_value_itself():
    builder = GraphBuilder(torch.float32)
    x = builder.take_input("x", torch.float32, ["rows", 6])
    split = builder.reshape(x, [-1, 3, 2])
    builder.give_output("y", builder.reshape(split, [0, -1]), torch.float32, ["rows", 6])
    builder.give_output("z", builder.reshape(builder.reshape(x, [-1, 2]), [0, 2, 1]), torch.float32, ["pairs", 2, 1])
    given = np.ones((4, 6), np.float32)
    assert [found.shape for found in run(builder, x=given)] == [(4, 6), (12, 2, 1)]


def test_inputs_that_name_a_dimension_alike_are_asked_once():
    builder = GraphBuilder(torch.float32)
    names = [builder.take_input(name, torch.float32, ["rows", 2]) for name in ("x", "y")]
    other = builder.take_input("z", torch.float32, ["others", 2])
    sizes = [builder.size(name, 0) for name in (*names, other)]
    assert sizes[0] == sizes[1] != sizes[2]
    shapes = [builder.reshape(name, [size, 1, 2]) for name, size in zip((*names, other), sizes, strict=True)]
    builder.give_output("o", builder.op("Concat", *shapes, axis=0), torch.float32, ["all", 1, 2])
    assert sorted(operators(builder)) == ["Concat"] * 3 + ["Reshape"] * 3 + ["Shape"] * 2
    values = {name: np.full((rows, 2), rows, np.float32) for name, rows in (("x", 2), ("y", 2), ("z", 3))}
    assert run(builder, **values)[0].shape == (7, 1, 2)


def test_outputs_are_the_values_themselves_and_copies_only_where_they_must_be():
    builder = GraphBuilder(torch.float32)
    x = builder.take_input("x", torch.float32, [3])
    negative = builder.op("Neg", x)
    builder.give_output("y", negative, torch.float32, [3])
    builder.give_output("z", builder.op("Abs", negative), torch.float32, [3])
    assert operators(builder) == ["Neg", "Abs"]
    builder.give_output("again", negative, torch.float32, [3])
    builder.give_output("same", x, torch.float32, [3])
    assert operators(builder) == ["Neg", "Abs", "Identity", "Identity"]
    given = np.array([1, -2, 3], np.float32)
    found = run(builder, x=given)
    assert [values.tolist() for values in found] == [
        (-given).tolist(),
        abs(given).tolist(),
        (-given).tolist(),
        given.tolist(),
    ]


def test_bodies_keep_what_they_read_under_its_new_name():
    builder = GraphBuilder(torch.float32)
    x = builder.take_input("x", torch.float32, ["rows", 2])
    doubled = builder.op("Add", x, x)
    count = builder.op("Squeeze", builder.size(x, 0))

    def row(body, number):
        body.op("Neg", doubled)
        return body.op("Gather", doubled, number)

    collected = builder.loop(count, row, axis=0)
    builder.give_output("y", doubled, torch.float32, ["rows", 2])
    builder.give_output("z", collected, torch.float32, ["rows", 2])
    graph = builder.graph("g")
    (body,) = (a.g for node in graph.node for a in node.attribute if a.name == "body")
    assert "Neg" not in [node.op_type for node in body.node]
    given = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = run(builder, x=given)
    assert (found[0] == 2 * given).all()
    assert (found[1] == 2 * given).all()
