"""A build that cannot fit on the disk is refused before the model is captured."""

from __future__ import annotations

import json
import shutil
import struct

import pytest

from vlmbuild.builder.build import build, least_bytes
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.errors import OutputError
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.zoo import ZOO


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1), ("bfloat16", 2)])
def test_a_full_disk_is_found_before_the_capture(dtype, share, tmp_path):
    """The weights are a sparse file with more bytes than the disk has free."""
    source = shutil.copytree(ZOO["qwen2-vl-digits"], tmp_path / "source")
    free = shutil.disk_usage(tmp_path).free
    rows = 3 * free // 4096
    name = "model.layers.0.mlp.up_proj.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, 4096 * rows]}}).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4096 * rows)
    stages = []
    with pytest.raises(OutputError, match=f"{4096 * rows // share} bytes .* are needed"):
        build(source, tmp_path / "out", Recipe(dtype=dtype), progress=lambda stage, *_: stages.append(stage))
    assert not any("capture" in stage for stage in stages)
    assert not (tmp_path / "out").exists()


def test_the_least_is_less_than_what_is_stored_and_close_to_it(nf4, plain, checkpoint):
    opened = Checkpoint.open(checkpoint)
    for artifact, recipe in ((nf4, Recipe(quantize=QuantSpec(), dtype="float32")), (plain, Recipe(dtype="float32"))):
        stored = (artifact.path / "model.safetensors").stat().st_size
        assert 0.9 * stored < least_bytes(opened, recipe) <= stored
    quantized = Checkpoint.open(nf4.path)  # keeps its 4 bits
    assert least_bytes(quantized, Recipe(dtype="float32")) < 0.6 * least_bytes(opened, Recipe(dtype="float32"))
