"""Bytes of the parameters of an artifact's ONNX models, read without torch."""

from __future__ import annotations

from pathlib import Path

LOOKUP = "Gather"
"""Operator that looks rows of a MatMulNBits weight up; its node's metadata has the attributes of that weight."""
PACKED = {
    "MatMulNBits": ("", "_scales", "_zero_points"),
    "MatMulBnb4": ("", "_absmax"),
    LOOKUP: ("", "_scales", "_zero_points"),
}
"""Operator -> suffixes of its weight's tensors, in the order of a product's inputs."""
WEIGHT_INPUT = {operator: 0 if operator == LOOKUP else 1 for operator in PACKED}
"""Operator -> index of the weight among its inputs."""


def stored_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each parameter with its scales, by module name, in all data files of `folder`."""
    import onnx

    lengths: dict[tuple[str, str], int] = {}
    owners: dict[str, str] = {}
    for file in sorted(folder.glob("*.onnx")):
        graph = onnx.load(file, load_external_data=False).graph
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                location = {entry.key: entry.value for entry in tensor.external_data}
                lengths[location["location"], tensor.name] = int(location["length"])
        for node in graph.node:
            if node.op_type in PACKED and (node.op_type != LOOKUP or node.metadata_props):
                weight = node.input[WEIGHT_INPUT[node.op_type]]
                owners |= {weight + suffix: weight for suffix in PACKED[node.op_type]}
    sizes: dict[str, int] = {}
    for (_, name), length in lengths.items():
        owner = owners.get(name, name)
        sizes[owner] = sizes.get(owner, 0) + length
    return sizes
