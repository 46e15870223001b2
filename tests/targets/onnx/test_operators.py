"""Lookups in packed weights: the values that the same bytes stand for in products."""

import numpy as np
import onnxruntime
import pytest
import torch

from vlmbuild.formats import PackedWeight
from vlmbuild.ops import OPERATORS
from vlmbuild.quant.int4 import Int4
from vlmbuild.quant.int8 import Int8
from vlmbuild.quant.ort_matmul import unpacked
from vlmbuild.targets.onnx.graph_builder import GraphBuilder
from vlmbuild.targets.onnx.layout import DataFile
from vlmbuild.targets.onnx.operators import table
from vlmbuild.targets.onnx.translate import Site, Value

ROWS = 24


def lookup(weight, parts, compute, ids, folder):
    """Look rows up in ONNX Runtime, with the weight in a data file."""
    builder, data = GraphBuilder(compute), DataFile("w.data")
    places = {
        s: data.place(p.dtype, p.shape if s == "" else (ROWS, p.shape[0] // ROWS)) for s, p in weight.parts.items()
    }
    content = bytearray(data.size)
    for suffix, place in places.items():
        builder.weight(f"w{suffix}", place)
        content[place.offset : place.offset + place.length] = parts[suffix].numpy().tobytes()
    (folder / "w.data").write_bytes(content)
    meta = torch.empty(ids.shape, dtype=torch.int64, device="meta")
    slot = Value("w", torch.empty(ROWS, weight.attributes["K"], device="meta"))
    given = Value(builder.take_input("ids", torch.int64, list(ids.shape)), meta)
    handler = table({"w": weight})[OPERATORS["embedding_packed"].overload]
    builder.give_output(
        "y", handler(Site(builder, meta), slot, given, ""), compute, [*ids.shape, weight.attributes["K"]]
    )
    model = builder.model("m")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": ids})[0], model


@pytest.mark.parametrize("columns", [64, 200])  # 200: a block that is not full, and with 64 an even number of them
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", [Int4(32), Int4(32, symmetric=False), Int4(), Int8()], ids=str)
def test_a_lookup_gives_the_rows_that_a_product_multiplies_by(form, dtype, columns, tmp_path):
    (chunk,) = form.encode_onnx([torch.randn(ROWS * columns)], (ROWS, columns), dtype, "w")
    weight = form.onnx_weight((ROWS, columns), dtype, "w")
    ids = np.array([[0, 5, 5], [ROWS - 1, 7, 0]])
    found, model = lookup(weight, chunk.parts, dtype, ids, tmp_path)
    assert torch.from_numpy(found).equal(chunk.rounded.to(dtype)[torch.from_numpy(ids)])
    assert {node.domain for node in model.graph.node} == {""}  # browsers have the standard operators alone
    (entries,) = (
        {e.key: int(e.value) for e in node.metadata_props} for node in model.graph.node if node.metadata_props
    )
    shaped = {suffix: part.reshape(weight.parts[suffix].shape) for suffix, part in chunk.parts.items()}
    assert unpacked(PackedWeight("Gather", entries, {}), shaped).equal(chunk.rounded)
