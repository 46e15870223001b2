"""A format is one class and one row: a toy format of 8-bit rows is planned, built, loaded and read back as a source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from checkpoints import copied, edit_weights

import vlmbuild
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.artifact.weights_writer import TensorSpec
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.formats import FORMATS, Buffer, QuantizedSource, WeightFormat, ranges, unfit
from vlmbuild.util.validation import one_of


@dataclass(frozen=True, slots=True)
class Rows8(WeightFormat):
    """Signed bytes of at most `largest`, with a scale for each row, multiplied by the 8-bit operator."""

    largest: int = 127

    name: ClassVar[str] = "rows8"
    marker: ClassVar[str] = ".weight.row_scales"

    def __post_init__(self) -> None:
        one_of("largest", self.largest, (63, 127))

    def bits(self, shape):
        return 8 * math.prod(shape) + 32 * shape[0]

    def describe(self, target="trainable"):
        return f"rows8 up to {self.largest}"

    def parts(self, module, shape, dtype):
        return (
            TensorSpec(f"{module}.weight", torch.int8, shape),
            TensorSpec(f"{module}{self.marker}", torch.float32, shape[:1]),
        )

    def encode(self, chunks, shape, dtype, name):
        for chunk in chunks:
            rows = chunk.view(-1, shape[1]).float()
            scales = rows.abs().amax(1).clamp(min=1e-12) / self.largest
            yield ".weight", (rows / scales[:, None]).round().to(torch.int8)
            yield self.marker, scales

    @classmethod
    def check(cls, weights: CheckpointWeights, module: str, config: Mapping[str, Any]) -> QuantizedSource:
        info, scales = weights.tensors[f"{module}.weight"], weights.tensors[module + cls.marker]
        if scales.shape != info.shape[:1]:
            raise unfit(weights, f"{module}.weight", "it does not have a scale for each row")
        return QuantizedSource(cls(), torch.float32, info.shape, (".weight", cls.marker))

    def decode(self, weights, module, shape, dtype, step):
        scales = weights.read(module + self.marker)
        for first, count in ranges(math.prod(shape), max(1, step // shape[1]) * shape[1]):
            rows = weights.read_part(f"{module}.weight", first, count).view(-1, shape[1])
            yield (rows * scales[first // shape[1] :][: len(rows), None]).to(dtype).flatten()

    def buffers(self, shape):
        return {"": Buffer(torch.int8, shape), "_scales": Buffer(torch.float32, shape[:1])}

    def call(self, shape, input, stored, bias):
        return torch.ops.vlmbuild.linear_8bit.default, (input, stored[""], stored["_scales"], bias, 0.0)

    def load(self, weights, module, shape):
        return {"": weights.map(f"{module}.weight"), "_scales": 127 * weights.map(module + self.marker)}


@pytest.fixture(autouse=True, scope="module")
def row():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, "rows8", f"{__name__}:Rows8")
        yield


@pytest.fixture(scope="module")
def built(row, tmp_path_factory):
    recipe = vlmbuild.Recipe(quantize=spec(), dtype="float32")
    return vlmbuild.build("qwen2-vl-digits", tmp_path_factory.mktemp("built") / "one", recipe)


def spec(**options):
    return vlmbuild.QuantSpec("rows8", roles=("language", "vision"), **options)


def test_a_model_is_built_loaded_and_read_as_a_source(built, tmp_path):
    model, processor = vlmbuild.load(built.path)
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    again = vlmbuild.build(built.path, tmp_path / "two", vlmbuild.Recipe(dtype="float32"))  # keeps the stored bytes
    one, two = CheckpointWeights(built.path), CheckpointWeights(again.path)
    assert one.tensors.keys() == two.tensors.keys()
    marked = [name for name in one.tensors if name.endswith(Rows8.marker)]
    assert marked
    assert all(torch.equal(one.read(name), two.read(name)) for name in marked)
    recipe = vlmbuild.Recipe(quantize=vlmbuild.QuantSpec("none"), dtype="float32")
    plain = vlmbuild.build(built.path, tmp_path / "none", recipe)
    assert not any(name.endswith(Rows8.marker) for name in CheckpointWeights(plain.path).tensors)
    dense, _ = vlmbuild.load(plain.path)
    with torch.no_grad():
        logits, expected = model(**batch).logits, dense(**batch).logits
    # The operator rounds its inputs to 8 bits, and nothing else.
    assert 0 < float((logits - expected).norm() / expected.norm()) < 0.1


def test_its_options_are_those_of_the_spec():
    recipe = vlmbuild.Recipe(quantize=spec(largest=63))
    assert recipe.quantize.weight_format() == Rows8(63)
    assert recipe.to_mapping()["quantize"]["largest"] == 63
    assert vlmbuild.Recipe.from_mapping(recipe.to_mapping()) == recipe
    with pytest.raises(UsageError, match=r"quantize\.largest cannot be 100\. Choose one of: 63, 127"):
        spec(largest=100)
    with pytest.raises(UsageError, match=r"quantize\.largest is not an option of nf4"):
        vlmbuild.QuantSpec("nf4", largest=63)
    with pytest.raises(UsageError, match=r"rows8 cannot be built with --target onnx.*trainable or --target aoti"):
        vlmbuild.Recipe(target="onnx", quantize=spec())


def test_tensors_that_do_not_fit_are_refused(built, tmp_path):
    source = copied(built.path, tmp_path / "source")

    def cut(tensors):
        name = next(name for name in tensors if name.endswith(Rows8.marker))
        tensors[name] = tensors[name][1:].clone()

    edit_weights(source, cut)
    with pytest.raises(SourceError, match="does not have a scale for each row"):
        vlmbuild.build(source, tmp_path / "two")
