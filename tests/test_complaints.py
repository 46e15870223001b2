"""Common complaints about other tools: each is impossible here, or refused with a message that says what to do.

Complaint 12, processes with and without images, is in `runtime/torch/test_distributed.py` (the case "ddp").
"""

from __future__ import annotations

import copy
import importlib
import os
import shutil

import matrix
import pytest
import tiny
import torch
import transformers
from adapters import edit_adapter, write_adapter
from processors import photographs
from samples import one_image, text_only, turn, two_images
from setups import PROCESSORS
from torch._dynamo.testing import CompileCounterWithBackend

import vlmbuild
from vlmbuild import VisionDataCollator
from vlmbuild.adapters.merge import Merge
from vlmbuild.adapters.select import adaptable_layers
from vlmbuild.capture.export import capture
from vlmbuild.checkpoint.source import PROCESSOR_FILES
from vlmbuild.errors import BatchError, ParityError, PassError, SourceError, UsageError
from vlmbuild.families import FAMILIES, family_of_processor
from vlmbuild.ir.dims import shape_names
from vlmbuild.ir.linear_layers import linear_layers
from vlmbuild.passes import FuseRope
from vlmbuild.quant.decide import decide
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.zoo import ZOO


@pytest.fixture(params=PROCESSORS)
def processor(request):
    return PROCESSORS[request.param]()


def test_complaint_01_image_tokens_differ_from_features_by_truncation(processor):
    """Whatever max_length: every image has all its tokens, or the sample is refused by name."""
    example = two_images()
    media = torch.tensor(sorted(family_of_processor(processor).media_tokens(processor)))
    whole = VisionDataCollator(processor)([example])
    wanted = int(torch.isin(whole["input_ids"], media).sum())
    length = whole["input_ids"].shape[1]
    limits = [*range(1, length, max(1, length // 12)), length - 1, length]
    refused = 0
    for max_length in limits:
        try:
            batch = VisionDataCollator(processor, max_length=max_length)([example])
        except BatchError as error:
            assert 'Sample 0 ("Compare with")' in str(error)
            assert "Raise max_length" in str(error)
            refused += 1
            continue
        assert int(torch.isin(batch["input_ids"], media).sum()) == wanted
        assert batch["input_ids"].shape[1] <= max_length
    assert 0 < refused < len(limits) - 1


def test_complaint_02_pixel_limits_are_ignored():
    for name, size in (("qwen2_vl", {"longest_edge": 100 * 28 * 28}), ("pixtral", {"longest_edge": 160})):
        processor = PROCESSORS[name]()
        collator = VisionDataCollator(processor, size=size)
        own, lower = VisionDataCollator(processor)([one_image("retina")]), collator([one_image("retina")])
        tokens = int(torch.isin(lower["input_ids"], collator.media).sum())
        assert tokens <= 110 < int(torch.isin(own["input_ids"], collator.media).sum())
        assert collator.measure(one_image("retina")).tokens == lower["input_ids"].numel()
        with pytest.raises(UsageError, match="longest_edge must be from 1 to .*the limit of the processor"):
            VisionDataCollator(processor, size={"longest_edge": processor.image_processor.size["longest_edge"] + 1})
    with pytest.raises(UsageError, match="shortest_edge .* above longest_edge"):
        VisionDataCollator(PROCESSORS["qwen2_vl"](), size={"longest_edge": 3000})
    with pytest.raises(UsageError, match=r"none: Llama 3\.2 Vision"):
        VisionDataCollator(PROCESSORS["mllama"](), size={"height": 112})


def test_complaint_11_mixed_and_text_only_batches(processor):
    collator = VisionDataCollator(processor)
    text = collator([text_only(), text_only("Hi.", "Hello.")])
    assert not {key for key in text if key.startswith(("pixel", "image", "aspect", "cross"))}
    for order in ([text_only(), one_image(), two_images()], [two_images(), text_only(), one_image()]):
        batch = collator(order)
        for row, example in enumerate(order):
            alone, length = collator([example]), int(batch["attention_mask"][row].sum())
            assert torch.equal(batch["input_ids"][row, :length], alone["input_ids"][0])
            assert torch.equal(batch["labels"][row, :length], alone["labels"][0])
    for images, found in (([], 0), ([photographs()["tall"]] * 3, 3)):
        with pytest.raises(BatchError, match=f"Sample 1 .*has 2 image placeholders .* {found} images"):
            collator([text_only(), {**two_images(), "images": images}])


def test_complaint_13_processor_or_chat_template_lost(processor, tmp_path):
    with pytest.raises(UsageError, match="vlmbuild.load returns"):
        VisionDataCollator(processor.tokenizer)
    bare = copy.copy(processor)
    bare.chat_template = None
    with pytest.raises(UsageError, match=r"no chat template.*vlmbuild\.load"):
        VisionDataCollator(bare)
    processor.save_pretrained(tmp_path)
    again = FAMILIES[family_of_processor(processor).name].processor(tmp_path)
    first, second = VisionDataCollator(processor)([two_images()]), VisionDataCollator(again)([two_images()])
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_complaint_13_artifacts_keep_the_template(nf4, tmp_path):
    from vlmbuild import load

    _, processor = load(nf4.path)
    assert processor.chat_template == (ZOO["qwen2-vl-digits"] / "chat_template.jinja").read_text()
    VisionDataCollator(processor)([text_only()])
    shutil.copytree(nf4.path, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").unlink()
    with pytest.raises(Exception, match=r"chat_template\.jinja"):
        load(tmp_path / "copy")


def test_complaint_14_loss_on_responses_only(processor):
    """Also where the question and the answer say the same, and where the answer looks like a prompt."""
    collator = VisionDataCollator(processor)
    again = "assistant\nWhat is this?"
    example = {"messages": [turn("user", photographs()["tall"], again), turn("assistant", again)]}
    batch = collator([example, text_only()])
    said = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert said.lstrip().startswith(again)  # some templates put the space before an answer into the answer
    assert said.count(again) == 1
    labelled = (batch["labels"] != -100).nonzero()
    assert labelled[labelled[:, 0] == 0, 1].min() > torch.isin(batch["input_ids"][0], collator.media).nonzero().max()
    assert not torch.isin(batch["labels"], collator.media).any()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.fixture(params=["qwen2_vl", "mllama", "pixtral"])
def setup(request):
    return matrix.tiny(request.param)


def test_complaint_03_layers_quantized_by_accident(setup):
    """Layers are chosen for quantization by their role in the graph; a pattern that matches nothing is an error."""
    program = matrix.program(setup)
    roles = {layer.module: layer.role for layer in linear_layers(program)}
    chosen = {module for module, decision in decide(program, QuantSpec()).items() if decision.format}
    assert {roles[module] for module in chosen} == {"language"}
    assert chosen == {module for module, role in roles.items() if role == "language"}
    with pytest.raises(UsageError, match=r"'visual\.blocks\.\*\.attn' matches no linear layer"):
        decide(program, QuantSpec(skip=("visual.blocks.*.attn",)))


def attributes(*modules):
    """Return all attributes of modules and of their classes."""
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {(part.__name__, name): value for part in (*modules, *classes) for name, value in list(vars(part).items())}


def test_complaint_04_upgrade_breaks_patches(setup):
    """Nothing of transformers or torch is replaced, so there is no patch to go stale; a pass that stops matching is an error."""
    library = importlib.import_module(type(matrix.reference(setup)).__module__)
    modules = (library, transformers.modeling_utils, torch.nn.functional, torch.nn.modules.linear)
    before = attributes(*modules)
    capture(setup.family, setup.config(), "text")
    model = matrix.bind(setup, matrix.program(setup), matrix.reference(setup)).train()
    vlmbuild.add_lora(model, r=2, vision=True)
    ids = torch.ones(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    after = attributes(*modules)
    assert not [name for name in before if before[name] is not after[name] and not name[1].startswith("__")]
    ours = [name for name, value in after.items() if (getattr(value, "__module__", "") or "").startswith("vlmbuild")]
    assert not ours  # nor when vlmbuild was imported
    region = tiny.linear_region()
    with pytest.raises(PassError, match="Required pass fuse_rope matched nothing"):
        run([FuseRope()], tiny.region_program(region), require=["fuse_rope"])


def test_complaint_05_graph_breaks_and_recompiles(model):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)  # a graph break would be an error
    for layout in (
        [[5, (1, 4, 6), 7]],
        [[3, (1, 2, 8), 2, (1, 6, 4)], [9, (1, 2, 2), 4]],
        [[2, (1, 2, 2)]],
        [[4], [3, (1, 8, 8)]],
    ):
        batch, labels = tiny.make_batch(layout)
        compiled(**batch, labels=labels).loss.backward()
        assert counter.frame_count == 6
    torch._dynamo.reset()


def test_complaint_06_mrope_is_silently_one_dimensional(config):
    values = tiny.config_values()
    del values["text_config"]["rope_parameters"]["mrope_section"]
    with pytest.raises(SourceError, match="mrope_section None .*silently be one-dimensional"):
        tiny.FAMILY.config(values)
    batch, _ = tiny.make_batch([[5, (1, 4, 6), 7]])
    for keys in (tuple(batch), ("input_ids", "pixel_values", "image_grid_thw")):  # also without mm_token_type_ids
        positions = tiny.FAMILY.prepare({key: batch[key] for key in keys}, config).tensors["position_ids"][:, 0, 6:12]
        assert positions.tolist() == [[6] * 6, [6, 6, 6, 7, 7, 7], [6, 7, 8, 6, 7, 8]]


def test_complaint_09_vision_adapter_gets_no_gradient_under_checkpointing(setup):
    model = matrix.bind(setup, matrix.program(setup), matrix.reference(setup)).train()
    vlmbuild.add_lora(model, r=2, vision=True)
    model.gradient_checkpointing_enable()
    said = [["Look", matrix.photographs()["rocket"].resize((60, 90)), "Name three planets."]]
    batch, labels = matrix.batch(setup, said, "right")
    audit = vlmbuild.audit_gradients(model, {**batch, "labels": labels})
    vision = {layer.module for layer in adaptable_layers(model.program) if layer.role == "vision"}
    assert {name.partition(".lora_")[0] for name in audit.norms} >= vision
    assert min(audit.norms.values()) > 0


def test_complaint_15_data_dependent_loops_and_guards(setup):
    """Every variant has all its sizes open, or the capture fails; and no value of a tensor decides anything."""
    program = matrix.program(setup)
    assert set(program.variants) == set(setup.family.variants(setup.config()))
    assert all(shape_names(entry.shape for entry in variant.inputs) for variant in program.variants.values())
    nodes = [node for region in program.regions.values() for node in region.graph.graph.nodes]
    targets = {str(node.target) for node in nodes if node.op == "call_function"}
    assert not targets & {"aten.item.default", "aten._local_scalar_dense.default", "aten.nonzero.default"}


@pytest.fixture(scope="module")
def trained(zoo_artifact, tmp_path_factory):
    """An NF4 artifact, and an adapter that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    artifact = zoo_artifact("qwen2-vl-digits", quantize=QuantSpec(), dtype="float32").path
    return artifact, write_adapter(artifact, folder / "adapter")


def test_complaint_07_merged_model_differs_from_adapter(trained, tmp_path, monkeypatch):
    """The manifest says by how much; where it is more than rounding, nothing is published."""
    artifact, adapter = trained
    merged = vlmbuild.build(artifact, tmp_path / "merged", Recipe(dtype="bfloat16"), adapter=adapter)
    (record,) = merged.manifest.numerics
    assert float(record["error"]) < 0.1 * float(record["effect"])
    monkeypatch.setattr(Merge, "merged", lambda _self, _name, values, _first: values.float())
    with pytest.raises(ParityError, match="Nothing was published"):
        vlmbuild.build(artifact, tmp_path / "out", Recipe(dtype="bfloat16"), adapter=adapter)
    assert os.listdir(tmp_path) == ["merged"]


def test_complaint_08_adapter_not_loaded_after_key_rename(trained, tmp_path):
    """Published names of older versions are the same layers; any other name is refused, for loading and for merging."""
    artifact, adapter = trained
    old = shutil.copytree(adapter, tmp_path / "old")
    edit_adapter(old, lambda t: {key.replace("model.language_model.", "model."): value for key, value in t.items()})
    one, two = vlmbuild.load(artifact)[0], vlmbuild.load(artifact)[0]
    vlmbuild.load_adapter(one, adapter)
    vlmbuild.load_adapter(two, old)
    for (name, expected), (other, found) in zip(one.trainable_parameters(), two.trainable_parameters(), strict=True):
        assert name == other
        assert torch.equal(expected, found), name
    edit_adapter(old, lambda t: {key.replace("layers.0.", "blocks.0."): value for key, value in t.items()})
    with pytest.raises(SourceError, match=r"target_modules .* does not match model\.blocks\.0\.mlp\.down_proj"):
        vlmbuild.load_adapter(vlmbuild.load(artifact)[0], old)
    with pytest.raises(SourceError, match=r"target_modules .* does not match model\.blocks\.0\.mlp\.down_proj"):
        vlmbuild.build(artifact, tmp_path / "out", adapter=old)


def test_complaint_13_processor_or_chat_template_lost_after_a_merge(trained, tmp_path):
    """They are the source's, byte for byte; a source without a processor is refused before any work."""
    artifact, adapter = trained
    merged = vlmbuild.build(artifact, tmp_path / "merged", adapter=adapter).path
    kept = [name for name in PROCESSOR_FILES if (ZOO["qwen2-vl-digits"] / name).exists()]
    assert {"tokenizer.json", "chat_template.jinja", "processor_config.json"} <= set(kept)
    for name in kept:
        assert (merged / name).read_bytes() == (ZOO["qwen2-vl-digits"] / name).read_bytes(), name
    assert vlmbuild.load(merged)[1].chat_template
    bare = shutil.copytree(ZOO["qwen2-vl-digits"], tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        vlmbuild.build(bare, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_complaint_10_dtype_mismatch(nf4):
    """Whatever dtype is loaded and whatever autocast is around it: a step works, and adapters stay in float32."""
    batch, labels = tiny.make_batch([[5, (1, 4, 6), 7], [9]])
    losses = []
    for dtype in ("float32", "bfloat16", "float16"):
        model, _ = vlmbuild.load(nf4.path, dtype=dtype)
        vlmbuild.add_lora(model.train(), r=4, vision=True)
        for autocast in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = model(**batch, labels=labels).loss
            loss.backward()
            losses.append(float(loss.detach()))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
        assert any(p.grad.any() for p in trained)
    assert losses == pytest.approx([losses[0]] * 9, rel=0.02)
