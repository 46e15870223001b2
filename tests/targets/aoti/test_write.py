"""Artifacts with compiled code: what they compute, what opening them takes, and what a build refuses to publish."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import matrix
import pytest
import torch
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.builder.build import build
from vlmbuild.errors import CompileError, IncompatibleError, ParityError, TrustError, UsageError
from vlmbuild.kv_cache.block import FORMS
from vlmbuild.measure import aoti_parity as code_numerics
from vlmbuild.measure import numerics
from vlmbuild.measure.batches import cases
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.recipe import Recipe
from vlmbuild.runtime.aoti import code as compiled_code
from vlmbuild.runtime.aoti.code_index import CODE_INDEX
from vlmbuild.runtime.bind import bind_directory
from vlmbuild.targets.aoti import compilation
from vlmbuild.zoo import ZOO

pytestmark = pytest.mark.slow  # compiles code with g++

NAME = "qwen2-vl-digits"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, process_of_its_own):
    """A zoo checkpoint compiled in float32, and measured by another process."""
    with process_of_its_own():
        return build(NAME, tmp_path_factory.mktemp("aoti") / NAME, Recipe(target="aoti", dtype="float32"))


def assert_same_as_transformers(artifact, checkpoint):
    model, processor = vlmbuild.load(artifact, trust=("code",))
    theirs = matrix.positioned(AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)).eval()
    options = GREEDY | {"suppress_tokens": sorted(model.family.media_tokens(processor))}  # untrained models write them
    for case in cases(processor):
        shown = case.batch["attention_mask"].bool()
        with torch.no_grad():
            expected = theirs(**case.batch).logits[shown]
        found = model(**case.batch).logits[shown]
        assert float((found - expected).norm() / expected.norm()) < 1e-5, case.name
        tokens = theirs.generate(**case.batch, **options)
        assert model.generate(**case.batch, **options).equal(tokens), case.name
        assert model.generate(**case.batch, **options, cache_implementation="static").equal(tokens), case.name


def test_logits_and_greedy_tokens_are_those_of_transformers(artifact):
    assert_same_as_transformers(artifact.path, ZOO[NAME])


@pytest.mark.release
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_so_are_those_of_windows(family, checkpoint_of, tmp_path):
    """Windows of a tower, and of a language model: shorter than a prompt, than its answer and than a block of image tokens."""
    built = build(checkpoint_of(family), tmp_path / "aoti", Recipe(target="aoti", dtype="float32"))
    assert_same_as_transformers(built.path, checkpoint_of(family))


def test_it_is_a_checkpoint_too(artifact):
    source = AutoModelForImageTextToText.from_pretrained(ZOO["qwen2-vl-digits"], dtype=torch.float32)
    opened = AutoModelForImageTextToText.from_pretrained(artifact.path, dtype=torch.float32)
    for name, tensor in source.state_dict().items():
        assert tensor.equal(opened.state_dict()[name]), name


def test_every_block_is_compiled_once_however_deep_the_model_is(artifact):
    index = json.loads((artifact.path / CODE_INDEX).read_text())
    entries = [entry for named in index["regions"].values() for entry in named.values()]
    files = {entry[kind]["file"] for entry in entries for kind in ("code", "token") if kind in entry}
    assert files == set(artifact.manifest.trust["code"])
    assert list(index["regions"]) == sorted(FORMS)
    assert (
        len(files) == 4
    )  # a vision block; decoder blocks that return a grown cache, and that write into one, also for one row
    assert all(entry.size < 4 << 20 for entry in artifact.manifest.files if entry.role == "code")


COMPILE_VISION = """
import json, os, pathlib, sys
from vlmbuild.ir.serialize import from_json
from vlmbuild.targets.aoti import worker
from vlmbuild.targets.aoti.compilation import inductor_cache
program, folder = map(pathlib.Path, sys.argv[1:])
with inductor_cache() as cache:
    os.environ |= cache  # first, as the process that compiles gets it
    programs = worker.cached_programs(from_json(json.loads(program.read_text())))
    platform = worker.platform_compiled_for()
    print(worker.compile_unit(programs, worker.Unit("dynamic", "visual.blocks"), "float32", platform, folder))
"""


def test_the_same_graph_gives_the_same_bytes(artifact, tmp_path):
    """With another cache of inductor's, below a path with a space, another folder and another hash seed."""
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "in ductor"), "PYTHONHASHSEED": "7"}
    program, folder = artifact.path / "graph/program.json", str(tmp_path)
    subprocess.run(
        [sys.executable, "-c", COMPILE_VISION, program, folder],
        check=True,
        capture_output=True,
        env={**os.environ, **settings},
    )
    (file,) = (name for name in artifact.manifest.trust["code"] if name.endswith("visual.blocks.pt2"))
    assert (tmp_path / file).read_bytes() == (artifact.path / file).read_bytes()


def test_opening_takes_trust(artifact, run):
    with pytest.raises(TrustError, match=r"holds compiled code.*--trust-code"):
        vlmbuild.load(artifact.path)
    asked = ["run", artifact.path, "--prompt", "Read the digits."]
    code, _, err = run(*asked)
    assert code == 4
    assert "--trust-code" in err
    code, out, _ = run(*asked, "--trust-code", "--max-new-tokens", "4", "--json")
    assert code == 0
    assert json.loads(out)["new_tokens"] <= 4


def test_verify_runs_the_code_again(artifact, run):
    assert run("verify", artifact.path, "--numerics")[0] == 4
    code, out, _ = run("verify", artifact.path, "--numerics", "--trust-code", "--json")
    records = json.loads(out)["numerics"]
    assert code == 0
    assert len(records) == len(artifact.manifest.numerics) == 16
    assert {record["tolerance"] for record in records} == {"1e-04"}


def test_it_does_not_train(artifact):
    model, processor = vlmbuild.load(artifact.path, trust=("code",))
    batch = next(cases(processor)).batch
    with pytest.raises(UsageError, match="computes no loss"):
        model(**batch, labels=batch["input_ids"])
    with pytest.raises(UsageError, match=r"from vlmbuild\.load"):
        vlmbuild.add_lora(model, r=4)
    with pytest.raises(UsageError, match="cannot train"):
        model.train()
    assert isinstance(model, vlmbuild.CompiledVisionLanguageModel) and model.train(False) is model.eval() is model
    with pytest.raises(UsageError, match=r"was compiled for cpu.*with --dtype bfloat16\."):
        model.to(torch.bfloat16)
    with pytest.raises(UsageError, match="for the trainable target"):
        model.to(device="cuda")
    assert model.to("cpu") is model.to(device="cpu", dtype=torch.float32) is model
    with pytest.raises(UsageError, match="computes in the dtype that it was built with, float32"):
        vlmbuild.load(artifact.path, trust=("code",), dtype="bfloat16")


def test_trust_is_asked_for_however_files_are_called(artifact, tmp_path):
    with ArtifactWriter(tmp_path / "out") as writer:
        for entry in artifact.manifest.files:
            if entry.role != "code":
                writer.copy(artifact.path / entry.path, entry.path, entry.role)
        writer.publish(name="m", target="aoti", recipe=artifact.manifest.recipe)
    with pytest.raises(TrustError):
        vlmbuild.load(tmp_path / "out")


def test_autocast_changes_nothing(artifact):
    model, processor = vlmbuild.load(artifact.path, trust=("code",))
    batch = next(cases(processor)).batch
    plain = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**batch).logits.equal(plain)


def test_code_gets_what_it_was_compiled_for(artifact):
    model, _ = vlmbuild.load(artifact.path, trust=("code",))
    region = model.graphs.cached("static").bound["language_model.layers.cached"]
    assert len(region._written) == 2
    for place, dtype in region.code.inputs:
        value = torch.zeros(4, 4, dtype=torch.int16 if dtype.is_floating_point else torch.float32)
        with pytest.raises(UsageError, match="was compiled for"):
            region._laid_out(value, place, dtype)
    strided = torch.zeros(4, 4).T
    with pytest.raises(UsageError, match="has to be contiguous"):
        region._laid_out(torch.zeros(4, 8)[:, ::2], min(region._written), torch.float32)
    assert region._laid_out(strided[:, ::2], 0, torch.float32).is_contiguous()


def test_from_pretrained_has_no_place_for_code(tmp_path):
    with pytest.raises(UsageError, match="loaded with trust"):
        vlmbuild.from_pretrained("qwen2-vl-digits", target="aoti", cache_dir=tmp_path)
    with pytest.raises(UsageError, match="is built on cpu"):
        build(
            "qwen2-vl-digits",
            tmp_path / "out",
            Recipe(target="aoti"),
            device="cuda" if torch.cuda.is_available() else "meta",
        )


@pytest.mark.parametrize("length", [None, 8], ids=["dynamic", "static"])
def test_a_single_token_has_code_of_its_own(artifact, monkeypatch, length):
    model, _ = vlmbuild.load(artifact.path, trust=("code",))
    used = []
    for form in FORMS:
        region = model.graphs.cached(form).bound["language_model.layers.cached"]
        for kind in ("code", "_token"):
            if (code := getattr(region, kind)) is None:
                continue

            def note(tensors, runner=code.runner, name=f"{form} {kind}"):
                used.append(name)
                return runner(tensors)

            monkeypatch.setattr(region, kind, replace(code, runner=note))

    def said(cache, ids):
        used.clear()
        logits = model(input_ids=ids, past_key_values=cache).logits
        assert len(set(used)) == 1
        return logits, used[0]

    pairs = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    one, two, more = (model.new_cache(length) for _ in range(3))
    assert said(one, pairs[:1, :3])[1] == said(two, pairs[:, :3])[1] == "dynamic code"
    alone, its_code = said(one, pairs[:1, 3:])
    together, their_code = said(two, pairs[:, 3:])
    said(more, pairs[:1, :2])
    at_once, code_of_several = said(more, pairs[:1, 2:])
    assert (its_code, their_code, code_of_several) == ("static _token", "static code", "dynamic code")
    torch.testing.assert_close(alone, together[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone[:, -1], at_once[:, -1], rtol=1e-4, atol=1e-4)


def test_a_growing_cache_grows_beyond_its_room(artifact):
    """Tokens are those of a cache that had room for all of them."""
    model, _ = vlmbuild.load(artifact.path, trust=("code",))
    ids = torch.tensor([[5, 6, 7]])
    long = GREEDY | {"max_new_tokens": 2 * compiled_code._ROOM + 3, "return_dict_in_generate": True}
    dynamic, static = (model.generate(input_ids=ids, **long, cache_implementation=form) for form in (None, "static"))
    assert torch.equal(dynamic.sequences, static.sequences)
    room = {block.keys.shape[2] for block in dynamic.past_key_values.blocks}
    assert room == {3 + 3 * compiled_code._ROOM}


def changed(artifact, change):
    """Reads files, the index with a change."""

    def read(name):
        data = (artifact.path / name).read_bytes()
        if name != CODE_INDEX:
            return data
        index = json.loads(data)
        change(index)
        return json.dumps(index).encode()

    return read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["platform"].update(torch="1.0"), "for torch 1.0"),
        (lambda index: index["platform"].pop("libc"), "cannot be read"),
        (lambda index: index.update(dtype="bfloat16"), "computes in bfloat16, and its weights are in torch.float32"),
        (
            lambda index: index["regions"]["dynamic"]["visual.blocks"].update(graph="0"),
            "another graph for visual.blocks",
        ),
    ],
)
def test_code_that_does_not_fit_is_not_opened(artifact, monkeypatch, change, message):
    monkeypatch.setattr(compiled_code, "_runner", lambda *_: None)
    model = bind_directory(artifact.path, torch.float32)
    with pytest.raises(IncompatibleError, match=message):
        compiled_code.adopt_code(model, changed(artifact, change), "artifact")


def test_a_file_that_is_no_package_ends_no_process(artifact):
    model = bind_directory(artifact.path, torch.float32)

    def read(name):
        data = (artifact.path / name).read_bytes()
        return data if name == CODE_INDEX else data[:1000]

    with pytest.raises(IncompatibleError, match=r"not a package of torch.*Build the artifact again"):
        compiled_code.adopt_code(model, read, "artifact")


def test_code_that_computes_something_else_is_found(artifact, monkeypatch):
    run_region = compiled_code.CompiledRegion.run
    monkeypatch.setattr(
        compiled_code.CompiledRegion,
        "run",
        lambda self, *rest, **named: tuple(x * 1.001 for x in run_region(self, *rest, **named)),
    )
    records = code_numerics.measure(artifact.path, "float32")
    with pytest.raises(
        ParityError, match="The compiled regions differ from the program: case 'one image, dynamic cache'"
    ):
        numerics.check_records(records, "The compiled regions")


def test_without_a_compiler_nothing_is_published(tmp_path, monkeypatch):
    monkeypatch.setitem(compilation.SETTINGS, "CXX", "/none/g++")
    monkeypatch.setitem(compilation.SETTINGS, "PATH", "/none")
    with pytest.raises(CompileError, match=r"cannot be compiled: .*needs a C\+\+ compiler"):
        build("qwen2-vl-digits", tmp_path / "out", Recipe(target="aoti", dtype="float32"))
    assert list(tmp_path.iterdir()) == []


def test_recipes_that_have_no_compiled_form():
    with pytest.raises(UsageError, match="attention: triton"):
        Recipe(target="aoti", attention="triton")
    with pytest.raises(UsageError, match="int4"):
        Recipe(target="aoti", quantize=QuantSpec("int4"))
    assert Recipe(target="aoti").dtype == "bfloat16"


def test_a_damaged_package_is_found_before_it_is_opened(artifact, tmp_path, run):
    copy = shutil.copytree(artifact.path, tmp_path / "copy")
    file = copy / artifact.manifest.trust["code"][0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, _, err = run("run", copy, "--prompt", "x", "--trust-code")
    assert code == 3
    assert file.name in err
