"""The target compressed-tensors: the library and transformers open it, it is a source, and it says what was lost."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from adapters import answer_logits, write_adapter
from checkpoints import copied, edit_weights
from compressed_tensors.quantization.lifecycle import forward
from compressed_tensors.utils.match import match_named_modules
from parity import SAME_WEIGHTS_FP32, assert_close, relative
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

import vlmbuild
from vlmbuild.artifact.reader import verify
from vlmbuild.builder.build import build
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.errors import IncompatibleError, ParityError, SourceError, UsageError
from vlmbuild.families import FAMILIES
from vlmbuild.golden.files import CASES
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.recipe import Recipe
from vlmbuild.zoo import CHECKPOINTS, ZOO

QUICK = ("qwen2_vl",)
"""Families in every run; the others, half a minute of CPU each, run before a release."""
FORMATS = {
    "w4a16": {"roles": ("language",)},
    "w8a8": {"roles": ("language", "vision")},
    "fp8": {"roles": ("language",)},
}
ROUNDED_INPUTS = 0.1
"""Relative norm of logits where transformers rounds inputs to 8 bits too, as engines do."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.release) for name in FAMILIES],
)
def family(request):
    return request.param


def recipe(form, dtype="float32", **options):
    return Recipe(
        target="compressed-tensors", quantize=QuantSpec(form, **{**FORMATS.get(form, {}), **options}), dtype=dtype
    )


@pytest.fixture(scope="module")
def artifact_of(family, zoo_artifact):
    """Format -> the family's artifact in float32."""
    return lambda form: zoo_artifact(CHECKPOINTS.get(family, family), **{k: getattr(recipe(form), k) for k in FIELDS})


FIELDS = ("target", "quantize", "dtype")
LAYOUTS = {f"4 bits, {sharing}" for sharing in ("groups of 128", "groups of 64", "groups of 32", "one scale a row")}


def decisions(artifact):
    return {entry["module"]: entry for record in artifact.manifest.passes for entry in record.get("decisions", ())}


def test_transformers_computes_with_the_dequantized_weights(family, artifact_of):
    for form in FORMATS:
        artifact = artifact_of(form)
        ours, processor = vlmbuild.load(artifact.path)
        # Its `dequantize` knows one scheme, and rows of 192 have groups of their own; w4a16 rounds no inputs.
        exact = {} if form == "w4a16" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        theirs, loading = AutoModelForImageTextToText.from_pretrained(artifact.path, output_loading_info=True, **exact)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        expected = answer_logits(theirs, processor)  # decompresses
        assert_close(answer_logits(ours, processor), expected, SAME_WEIGHTS_FP32, form)
        weights = theirs.state_dict()
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, weights[name]), name
        if exact:
            rounding = answer_logits(AutoModelForImageTextToText.from_pretrained(artifact.path), processor)
            assert 0 < relative(rounding, expected) < ROUNDED_INPUTS, form


def test_schemes_match_the_quantized_layers_alone(family, artifact_of):
    for form in FORMATS:
        artifact = artifact_of(form)
        announced = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                FAMILIES[family].config_class.from_pretrained(artifact.path)
            )
        sizes = {}
        for group in announced["config_groups"].values():
            for name, _ in match_named_modules(model, group["targets"], announced["ignore"]):
                sizes.setdefault(name, group["weights"].get("group_size"))
        made = decisions(artifact)
        quantized = {module: entry for module, entry in made.items() if entry["format"]}
        assert sizes.keys() == quantized.keys()
        assert all(str(size or "row") in quantized[name]["format"] for name, size in sizes.items())
        # Every linear layer is one or the other, by each of its names, and nothing else is there.
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        names = {name: (name, *FAMILIES[family].client_names(name)) for name in linear}
        assert set(announced["ignore"]) == {other for name in linear - sizes.keys() for other in names[name]}


def test_it_is_a_source(family, artifact_of, tmp_path):
    """Values are read exactly, and a build in the same format keeps all bytes."""
    for form in FORMATS:
        path = artifact_of(form).path
        source, (model, _) = Checkpoint.open(path), vlmbuild.load(path)
        for name, parameter in model.named_parameters():
            assert torch.equal(source.tensors[name].whole(source.weights, torch.float32), parameter), name
    again = build(artifact_of("w4a16").path, tmp_path / "again", recipe("w4a16"))
    said = again.manifest.source[0]["dequantized"]
    assert set(said.removeprefix("compressed-tensors: ").split("; ")) <= LAYOUTS
    assert family != "qwen2_vl" or said == "compressed-tensors: 4 bits, groups of 128; 4 bits, groups of 64"
    one, two = (load_file(path / "model.safetensors") for path in (artifact_of("w4a16").path, again.path))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_losses_are_recorded_and_shown(zoo_artifact, run):
    options = {k: getattr(recipe("w4a16"), k) for k in FIELDS}
    artifact = zoo_artifact("qwen2-vl-digits", **options)
    made = decisions(artifact)
    down = made["model.language_model.layers.0.mlp.down_proj"]
    assert down["format"] == "w4a16, groups of 64"
    assert "192" in down["reason"]
    assert all(0.05 < float(entry["error"]) < 0.15 for entry in made.values() if entry["format"])
    assert all("error" not in entry for entry in made.values() if not entry["format"])
    weights = load_file(artifact.path / "model.safetensors")
    assert weights["model.layers.0.self_attn.q_proj.weight_packed"].dtype == torch.int32
    assert weights["visual.blocks.0.attn.qkv.weight"].dtype == torch.float32
    code, out, _ = run("inspect", artifact.path)
    assert code == 0
    assert "mean loss" in out
    assert max(made.values(), key=lambda entry: float(entry.get("error", 0)))["module"].rpartition(".")[2] in out
    verify(artifact.path)


def test_a_second_rounding_says_so(zoo_artifact, tmp_path, run):
    """4-bit weights, with an adapter merged into some of them."""
    base = zoo_artifact("qwen2-vl-digits", quantize=QuantSpec(), dtype="float32").path
    adapter = write_adapter(base, tmp_path / "adapter")
    merged = build(base, tmp_path / "merged", recipe("w8a8", roles=("language",)), adapter=adapter)
    assert {entry["reason"].partition(", to ")[0] for entry in decisions(merged).values() if entry["format"]} == {
        "rounded before"
    }
    assert all(float(entry["error"]) < 0.02 for entry in decisions(merged).values() if entry["format"])
    record, *golden = merged.manifest.numerics
    assert float(record["error"]) < float(record["effect"])
    assert all(0 < float(record["error"]) < 0.1 for record in golden)
    assert (merged.path / CASES).is_file()
    code, out, _ = run("inspect", merged.path)
    assert code == 0
    assert "nf4" in out
    assert "unquantized" in out
    # Language layers that no role asks for are dequantized.
    plain = build(base, tmp_path / "plain", recipe("none"))
    assert "quantization_config" not in json.loads((plain.path / "config.json").read_text())
    AutoModelForImageTextToText.from_pretrained(plain.path)


def test_an_adapter_can_be_trained_on_the_dequantized_model(zoo_artifact, tmp_path):
    base = zoo_artifact("qwen2-vl-digits", **{k: getattr(recipe("w4a16"), k) for k in FIELDS})
    adapter = write_adapter(base.path, tmp_path / "adapter")
    merged = build(base.path, tmp_path / "merged", recipe("w4a16"), adapter=adapter)
    changed = decisions(merged)["model.language_model.layers.0.self_attn.q_proj"]
    assert "4 bits, groups of 128" in changed["reason"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": QuantSpec("nf4")}, "nf4.*--target compressed-tensors.*w4a16"),
        ({"quantize": QuantSpec("w8a8", roles=("language", "embedding"))}, "embedding.*--target"),
        ({"quantize": QuantSpec("auto", budget="5bpw")}, "nf4.*--target compressed-tensors"),
    ],
)
def test_recipes_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        Recipe(target="compressed-tensors", **options)


def test_what_cannot_be_built_is_said_before_any_work(tmp_path, monkeypatch, run):
    for spec in (None, QuantSpec("source")):
        with pytest.raises(UsageError, match="--quantize w4a16"):
            build("qwen2-vl-digits", tmp_path / "out", Recipe(target="compressed-tensors", quantize=spec))
    with pytest.raises(UsageError, match="w8a8 cannot be built with --target trainable.*--target compressed-tensors"):
        Recipe(quantize=QuantSpec("w8a8"))
    code, _, err = run("plan", "qwen2-vl-digits", "--target", "compressed-tensors", "--quantize", "w4a16")
    assert code == 2
    assert "vlmbuild build --target compressed-tensors" in err
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(IncompatibleError, match=r"vlmbuild\[compressed-tensors\]"):
        build("qwen2-vl-digits", tmp_path / "out", recipe("fp8"))


def test_values_beyond_the_dtype_are_refused(tmp_path):
    path = copied(ZOO["qwen2-vl-digits"], tmp_path / "wide")
    name = next(name for name in load_file(path / "model.safetensors") if name.endswith("q_proj.weight"))

    def change(tensors):
        tensors[name] = tensors[name].float()
        tensors[name][0, 0] = 1e6

    edit_weights(path, change)
    with pytest.raises(SourceError, match=f"{name}.*--dtype bfloat16"):
        build(path, tmp_path / "out", recipe("w8a8", dtype="float16", roles=("language",)))


def test_a_weight_that_is_rounded_wrong_is_not_published(tmp_path, monkeypatch):
    """The library's numbers with another sign, for example."""
    quantize = forward.quantize
    monkeypatch.setattr(forward, "quantize", lambda *args, **options: -quantize(*args, **options))
    with pytest.raises(ParityError, match="was rounded wrong"):
        build("qwen2-vl-digits", tmp_path / "out", recipe("w8a8"))
    assert list(tmp_path.iterdir()) == []
