"""`vlmbuild verify --engine` runs engines in interpreters of their own, on artifacts with and without golden cases."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import engine_here
import pytest
from checkpoints import copied, edit_config

import vlmbuild
from vlmbuild.artifact.reader import verify
from vlmbuild.engines import ENGINES
from vlmbuild.engines.ask import Answers
from vlmbuild.engines.verify import verify_engine
from vlmbuild.errors import IncompatibleError
from vlmbuild.golden.compare import Answer

STAGES = [
    "tokens",
    "pixels",
    "patches",
    "features",
    "embeddings",
    "hidden.0",
    "hidden.1",
    "hidden.2",
    "logits",
    "greedy",
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A trainable artifact with golden cases."""
    output = tmp_path_factory.mktemp("golden") / "artifact"
    return vlmbuild.build("qwen2-vl-digits", output, vlmbuild.Recipe(dtype="float32"), golden=True)


def test_golden_cases_are_data_of_the_artifact(artifact):
    manifest = verify(artifact.path)
    golden = {entry.path: entry for entry in manifest.files if entry.path.startswith("golden/")}
    assert set(golden) == {
        "golden/cases.json",
        "golden/values.safetensors",
        *(f"golden/{name}.png" for name in ("0-0", "1-0", "1-1", "2-0")),
    }
    assert {entry.role for entry in golden.values()} == {"data"}
    assert sum(entry.size for entry in golden.values()) < 300_000
    assert [record["case"] for record in manifest.numerics] == [
        f"golden: {name}" for name in ("one image", "two images", "wide image", "text")
    ]
    assert all(float(record["error"]) <= float(record["tolerance"]) for record in manifest.numerics)


def test_an_artifact_without_golden_cases_is_as_before(plain):
    assert not [entry for entry in plain.manifest.files if entry.path.startswith("golden/")]
    assert not plain.manifest.numerics


def test_the_same_inputs_give_the_same_cases(artifact, tmp_path):
    again = vlmbuild.build("qwen2-vl-digits", tmp_path / "again", vlmbuild.Recipe(dtype="float32"), golden=True)
    assert again.manifest.id == artifact.manifest.id


def test_transformers_in_a_process_of_its_own(artifact, run):
    code, out, _ = run("verify", artifact.path, "--engine", "transformers", "--engine-python", sys.executable, "--json")
    engine = json.loads(out)["engine"]
    assert (code, engine["first"], engine["cases"]) == (0, None, 4)
    assert list(dict.fromkeys(result["stage"] for result in engine["results"])) == STAGES


def test_a_difference_is_named_and_exits_with_7(artifact, run, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)
    served = copied(artifact.path, tmp_path / "served")
    edit_config(served, lambda values: values.get("text_config", values).update(rms_norm_eps=0.1))
    code, out, err = run("verify", artifact.path, "--engine", "transformers", "--engine-model", served)
    assert code == 7
    assert "hidden.0" in err
    assert "differs" in out
    assert max(map(len, out.splitlines()[2:])) <= 80
    code, out, _ = run("verify", artifact.path, "--engine", "transformers", "--engine-model", served, "--json")
    assert (code, json.loads(out)["engine"]["first"]["stage"]) == (7, "hidden.0")


@pytest.mark.parametrize("folder", ["onnx", "other"])
def test_one_image_a_prompt_is_a_limit_of_onnx_models(folder, artifact, tmp_path, monkeypatch):
    """Whatever artifact they are a conversion of."""
    monkeypatch.setattr(
        "vlmbuild.engines.verify.ask", lambda _, __, records, **___: Answers("1", [Answer() for _ in records])
    )
    (tmp_path / folder).mkdir()
    found = verify_engine(artifact.path, artifact.manifest, "openvino", model=tmp_path)
    assert found["left_out"] == (["two images"] if folder == "onnx" else [])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "messages"),
        ('{"messages": [{"content": "x"}]}', "'role'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "'image'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]}', "gone.png"),
    ],
)
def test_a_line_that_is_no_case_says_what_it_lacks(line, said, artifact, run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{line}\n")
    code, _, err = run("verify", artifact.path, "--engine", "transformers", "--golden", file)
    assert (code, said in err, err.count("line 1")) == (2, True, 1)


def test_prompts_of_the_user(artifact, run, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)
    shutil.copy(artifact.path / "golden/0-0.png", tmp_path / "picture.png")
    content = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "Which digits?"}]
    line = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "1"}]}
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(line) + "\n")
    code, out, _ = run("verify", artifact.path, "--engine", "transformers", "--golden", file, "--json")
    assert (code, json.loads(out)["engine"]["cases"]) == (0, 1)
    file.write_text('{"messages": []}\n')
    code, _, err = run("verify", artifact.path, "--engine", "transformers", "--golden", file)
    assert code == 2
    assert "line 1" in err


@pytest.mark.skipif(not Path("/bin/false").exists(), reason="no /bin/false")
def test_an_engine_that_is_not_there(artifact, run, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.touch()
    wrong = {"/no/python": (2, "not found"), "/bin/false": (5, "ended with 1"), "/bin/true": (5, "no result")}
    for python, (code, said) in {**wrong, plain: (2, "cannot be executed")}.items():
        found, _, err = run("verify", artifact.path, "--engine", "transformers", "--engine-python", python)
        assert (found, said in err) == (code, True)
    code, _, err = run("verify", artifact.path, "--engine", "none")
    assert code == 2
    assert all(name in err for name in ENGINES)
    code, _, err = run("verify", artifact.path, "--engine", "onnxruntime")
    assert (code, "--engine transformers" in err) == (2, True)
    code, _, err = run("verify", artifact.path, "--engine-python", sys.executable)
    assert (code, "--engine" in err) == (2, True)


def test_a_missing_package_is_named_with_the_line_that_installs_it(artifact, monkeypatch):
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(IncompatibleError, match=r"pip install 'transformers"):
        verify_engine(artifact.path, artifact.manifest, "transformers")


@pytest.mark.slow
def test_onnxruntime_by_hand(onnx_artifact, monkeypatch):
    monkeypatch.setattr("vlmbuild.engines.ask.run_worker", engine_here.run_here)
    built = onnx_artifact("qwen2-vl-digits")
    found = verify_engine(built.path, built.manifest, "onnxruntime")
    assert found["first"] is None
    assert {"tokens", "pixels", "features", "embeddings", "logits", "greedy"} == {r["stage"] for r in found["results"]}


@pytest.mark.slow
def test_transformers_js(onnx_artifact, tmp_path_factory):
    import clients

    folder = tmp_path_factory.mktemp("node")
    try:
        clients.install(folder)
    except clients.UnavailableError as reason:
        pytest.skip(str(reason))
    built = onnx_artifact("qwen2-vl-digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODE_PATH", str(folder / "node_modules"))
        found = verify_engine(built.path, built.manifest, "transformers.js")
    assert found["first"] is None
    assert {"tokens", "pixels", "greedy"} == {result["stage"] for result in found["results"]}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(IncompatibleError, match="npm install"):
        patch.delenv("NODE_PATH", raising=False)
        verify_engine(built.path, built.manifest, "transformers.js")
