"""Sources in compressed-tensors', AWQ's and GPTQ's layouts: they become the values that their numbers stand for."""

from __future__ import annotations

import json

import matrix
import pytest
import torch
from checkpoints import copied, edit_config, edit_weights, write_tiny
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

from vlmbuild.artifact.reader import verify
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.builder.build import build
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.cli.output import show
from vlmbuild.errors import SourceError
from vlmbuild.planner.plan import plan
from vlmbuild.quant.dequantized import dequantized_weights
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.recipe import Recipe
from vlmbuild.report.contents import contents
from vlmbuild.report.tables import inspect_report

GROUP = 32
Q_PROJ = "model.layers.0.self_attn.q_proj"
SCHEMES = {
    "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
    "w4a16 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
    ),
    "w2a16": ("pack-quantized", {"num_bits": 2, "strategy": "group", "group_size": GROUP}),
    "w8a8 with zero points": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "w8a16 by channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8, one scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 40]},
    ),
}


TEXTS = {
    "w4a16": f"4 bits, groups of {GROUP}",
    "w8a8": "8 bits, one scale a row",
    "fp8, one scale": "8-bit floats, one scale",
    "fp8 blocks": "8-bit floats, blocks of 48 x 40",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny("qwen2_vl", tmp_path_factory.mktemp("plain"))


def is_quantized(name):
    return name.startswith("model.layers") and name.endswith("_proj.weight")


def scheme_of(name):
    form, weights = SCHEMES[name]
    inputs = {"num_bits": 8, "strategy": "token", "dynamic": True, "type": weights.get("type", "int")}
    inputs = {} if "pack" in form else {"input_activations": inputs}
    return QuantizationScheme(targets=["Linear"], weights=weights, format=form, **inputs)


def extremes(weight, args):
    """The least and the greatest value that share a scale, in the shape of the scales."""
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    found = blocks.amin((1, 3)), blocks.amax((1, 3))
    return (x.flatten() if args.strategy == "tensor" else x for x in found)


def compress(tensors, scheme, chosen=is_quantized):
    """Replace linear weights by what the library stores for them; return the values that it decompresses them to."""
    compressor, values = BaseCompressor.get_value_from_registry(scheme.format), {}
    for name in list(filter(chosen, tensors)):
        module, weight = name.removesuffix(".weight"), tensors.pop(name)
        scale, zero = calculate_qparams(*extremes(weight, scheme.weights), scheme.weights)
        state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
        stored = compressor.compress(state, scheme)
        values[name] = compressor.decompress(stored, scheme)["weight"]
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in stored.items()}
    return values


def compressed(plain, target, name):
    scheme = scheme_of(name)
    announced = {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head", "re:.*visual.*"],
    }
    path, values = copied(plain, target), {}
    edit_config(path, lambda config: config.update(quantization_config=announced))
    edit_weights(path, lambda tensors: values.update(compress(tensors, scheme)))
    return path, values


def read(path):
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_those_that_the_library_decompresses_to(plain, tmp_path, name):
    path, values = compressed(plain, tmp_path / "source", name)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    found = {weight.module: weight for weight in dequantized_weights(CheckpointWeights(path), config)}
    layouts = {weight.layout for weight in found.values()}
    assert layouts == {TEXTS.get(name, *layouts)}
    assert found.keys() == {name.removesuffix(".weight") for name in values}
    for module, weight in found.items():
        ours = torch.cat(list(weight.values(1000))).view(weight.shape)
        assert torch.equal(ours.to(torch.bfloat16), values[f"{module}.weight"]), module


def test_a_model_is_that_which_transformers_dequantizes(plain, tmp_path, capsys):
    path, _ = compressed(plain, tmp_path / "source", "w4a16")
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True), "dtype": torch.bfloat16}
    theirs = AutoModelForImageTextToText.from_pretrained(path, **options).state_dict()
    built = build(path, tmp_path / "out", Recipe(dtype="bfloat16")).path
    family = matrix.tiny("qwen2_vl").family
    ours = {family.module_name(name): tensor for name, tensor in read(built).items()}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert "quantization_config" not in json.loads((built / "config.json").read_text())
    (source,) = verify(built).source
    assert source["dequantized"] == f"compressed-tensors: 4 bits, groups of {GROUP}"
    show(contents(built), inspect_report, as_json=False)
    assert source["dequantized"] in capsys.readouterr().out
    # It may be quantized again, from the dequantized weights, and planned without any.
    again = [read(build(p, tmp_path / f"{p.name} nf4", Recipe(quantize=QuantSpec())).path) for p in (path, built)]
    assert again[0].keys() == again[1].keys() and all(torch.equal(again[0][name], again[1][name]) for name in again[0])
    (path / "model.safetensors").unlink()
    assert plan(path, Recipe(quantize=QuantSpec())).roles == plan(built, Recipe(quantize=QuantSpec())).roles


def test_columns_in_the_order_of_activations(plain, tmp_path):
    """Older versions of the library have stored the group of each column; -1 says that they lie in order."""
    path, values = compressed(plain, tmp_path / "source", "w4a16")
    columns = values[f"{Q_PROJ}.weight"].shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))

    def change(tensors):
        numbers = pack_to_int32(unpack_from_int32(tensors[f"{Q_PROJ}.weight_packed"], 4, (0, columns))[:, order], 4)
        tensors[f"{Q_PROJ}.weight_packed"] = numbers
        tensors[f"{Q_PROJ}.weight_g_idx"] = (order // GROUP).int()
        tensors["model.layers.0.self_attn.k_proj.weight_g_idx"] = torch.full((columns,), -1, dtype=torch.int32)

    edit_weights(path, change)
    tensors = Checkpoint.open(path)
    for name, expected in ((Q_PROJ, values[f"{Q_PROJ}.weight"][:, order]), *list(values.items())[1:3]):
        module = matrix.tiny("qwen2_vl").family.module_name(f"{name.removesuffix('.weight')}.weight")
        found = tensors.tensors[module].whole(tensors.weights, torch.float32)
        assert torch.equal(found.to(torch.bfloat16), expected), name


def pack(numbers, bits, order=None):
    """Pack unsigned numbers [rows, columns] along columns, the first in the lowest bits, or in an order of their own."""
    words = numbers.long().unflatten(1, (-1, 32 // bits))
    order = order or range(32 // bits)
    return sum(words[..., column] << bits * place for place, column in enumerate(order)).to(torch.int64).to(torch.int32)


def numbers_of(weight, bits, group=GROUP):
    """Numbers, zero points and float16 scales of groups: [out, in], [out, groups], [out, groups]."""
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).to(torch.float16)
    zeros = (-low / scales).round()
    numbers = (groups / scales[..., None].float() + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return numbers.flatten(1), zeros, scales


def awq(weight, group=GROUP):
    """A layer in AWQ's files, and its values."""
    numbers, zeros, scales = numbers_of(weight, 4, group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": pack(numbers.t(), 4, order), "qzeros": pack(zeros.t(), 4, order), "scales": scales.t()}
    return parts, (numbers.unflatten(1, (-1, group)) - zeros[..., None]).flatten(1) * scales.repeat_interleave(group, 1)


def gptq(weight, bits, less):
    """A layer in GPTQ's files whose columns are ordered by activations, and its values."""
    index = torch.arange(weight.shape[1]) // GROUP
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    order = index.argsort(stable=True)
    numbers, zeros, scales = numbers_of(weight[:, order], bits)
    numbers = numbers[:, order.argsort()]
    parts = {
        "qweight": pack(numbers, bits).t(),
        "qzeros": pack((zeros.t() - less) % 2**bits, bits),
        "scales": scales.t(),
        "g_idx": index.int(),
    }
    return parts, (numbers - zeros[:, index]) * scales[:, index]


LAYOUTS = {
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "awq by row": (lambda w: awq(w, w.shape[1]), {"quant_method": "awq", "group_size": -1, "version": None}),
    "gptq": (lambda w: gptq(w, 4, 1), {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "gptq in 2 bits": (lambda w: gptq(w, 2, 1), {"quant_method": "gptq", "bits": 2, "dynamic": {"-:.*visual.*": {}}}),
    "gptq_v2": (lambda w: gptq(w, 8, 0), {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}),
}


def repacked(plain, target, name):
    layer, announced = LAYOUTS[name]
    path, values = copied(plain, target), {}

    def change(tensors):
        for name in list(filter(is_quantized, tensors)):
            module = name.removesuffix(".weight")
            parts, values[module] = layer(tensors.pop(name))
            tensors.update({f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()})

    edit_config(path, lambda config: config.update(quantization_config=announced))
    edit_weights(path, change)
    return path, values


@pytest.mark.parametrize("name", LAYOUTS)
def test_integers_with_zero_points_become_their_values(plain, tmp_path, name):
    path, values = repacked(plain, tmp_path / "source", name)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    found = {weight.module: weight for weight in dequantized_weights(CheckpointWeights(path), config)}
    assert found.keys() == values.keys()
    for module, weight in found.items():
        assert torch.equal(torch.cat(list(weight.values(1000))).view(weight.shape), values[module]), module


def without(*parts):
    return lambda config, tensors: [tensors.pop(f"{Q_PROJ}.{part}") for part in parts]


def replaced(part, change):
    return lambda config, tensors: tensors.update(
        {f"{Q_PROJ}.{part}": change(tensors[f"{Q_PROJ}.{part}"]).contiguous()}
    )


def config_with(**options):
    return lambda config, tensors: config["quantization_config"].update(options)


def groups_with(**options):
    return lambda config, tensors: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("w4a16", config_with(format="marlin-24"), "format is 'marlin-24'"),
        ("w4a16", config_with(transform_config={"config_groups": {"u": {}}}), "transform_config"),
        ("w4a16", config_with(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        ("w4a16", groups_with(group_size=64), "no group of config_groups"),
        (
            "w4a16",
            groups_with(num_bits=8),
            "without zero points, fits no group of config_groups .*'num_bits'|num_bits 8",
        ),
        ("w4a16", groups_with(strategy=None), "no group of config_groups"),
        ("w4a16 with zero points", without("weight_zero_point"), "without zero points"),
        ("w4a16 with zero points", replaced("weight_zero_point", lambda t: t.flatten()), "weight_zero_point"),
        ("w4a16", replaced("weight_shape", lambda t: t[0]), "weight_shape is torch.int64 \\[\\], not two integers"),
        ("w4a16", replaced("weight_shape", lambda t: t.float()), "weight_shape is torch.float32"),
        ("w4a16", replaced("weight_scale", lambda t: t.to(torch.uint8)), "weight_scale.* torch.uint8"),
        ("w4a16", replaced("weight_packed", lambda t: t[:0]), "weight_shape says"),
        ("w4a16", config_with(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (
            "w4a16",
            lambda c, t: c["quantization_config"]["config_groups"].update(g={"format": "nvfp4-pack-quantized"}),
            "nvfp4-pack-quantized",
        ),
        ("w4a16", without("weight_shape"), "weight_shape"),
        ("w4a16", lambda c, t: t.update({f"{Q_PROJ}.weight_g_idx": torch.arange(4)}), "weight_g_idx.* 4 columns"),
        (
            "w4a16",
            lambda c, t: t.update({f"{Q_PROJ}.weight_g_idx": torch.arange(t[f"{Q_PROJ}.weight_shape"][1])}),
            "weight_g_idx.*groups up to",
        ),
        ("awq", config_with(version="gemv"), "version is 'gemv'"),
        ("awq", config_with(group_size=64), "do not fit .* groups of 64"),
        ("awq", config_with(group_size=None), "group_size is None"),
        ("awq", config_with(group_size=32.0), "group_size is 32.0"),
        ("gptq", config_with(bits=4.0), "bits is 4.0"),
        ("gptq", config_with(checkpoint_format=["gptq"]), "checkpoint_format"),
        ("gptq", config_with(dynamic={"+:.*": {"bits": 8}}), "dynamic"),
        ("gptq", replaced("scales", lambda t: t[:0]), "0 groups"),
        ("awq", without("qzeros"), ".qzeros"),
        ("gptq", config_with(bits=3), "bits is 3"),
        ("gptq", config_with(checkpoint_format="marlin"), "'marlin'"),
        ("gptq", config_with(bits=8), "do not fit .* in 8 bits"),
        ("gptq", without("g_idx"), ".g_idx"),
        ("gptq", lambda c, t: t[f"{Q_PROJ}.g_idx"].fill_(99), "groups from 99 to 99"),
        ("gptq", lambda c, t: t[f"{Q_PROJ}.scales"].neg_(), f"a scale in {Q_PROJ}.scales is negative"),
    ],
)
def test_what_does_not_fit_is_named(plain, tmp_path, name, change, message):
    path, _ = (compressed if name in SCHEMES else repacked)(plain, tmp_path / "source", name)

    def both(tensors):
        config = json.loads((path / "config.json").read_text())
        change(config, tensors)
        (path / "config.json").write_text(json.dumps(config))

    edit_weights(path, both)
    with pytest.raises(SourceError, match=message):
        for weight in Checkpoint.open(path).tensors.values():
            if weight.dequantized is not None:
                list(weight.dequantized.values(10**6))


def test_two_groups_and_zero_biases(plain, tmp_path):
    """Each weight is read by the group that it fits; a bias of zeros, as AutoGPTQ writes, is none."""
    path, values = compressed(plain, tmp_path / "source", "w4a16")
    module, scheme = f"{Q_PROJ}", scheme_of("w8a8")

    def change(tensors):
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{module}.{part}"]
        tensors[f"{module}.weight"] = load_file(plain / "model.safetensors")[f"{module}.weight"]
        values.update(compress(tensors, scheme, lambda name: name == f"{module}.weight"))
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(
            len(values["model.layers.0.self_attn.o_proj.weight"])
        )

    edit_weights(path, change)
    edit_config(
        path, lambda c: c["quantization_config"]["config_groups"].update(group_1=scheme.model_dump(mode="json"))
    )
    built = read(build(path, tmp_path / "out", Recipe(dtype="bfloat16")).path)
    assert all(torch.equal(built[name], value) for name, value in values.items())
    edit_weights(path, lambda tensors: tensors["model.layers.0.self_attn.o_proj.bias"].fill_(1))
    with pytest.raises(SourceError, match=r"holds .*o_proj\.bias"):
        build(path, tmp_path / "other", Recipe(dtype="bfloat16"))
