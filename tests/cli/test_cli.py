"""The command line: documents and tables, exit codes, one paragraph for every mistake, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from checkpoints import copied, interruptible
from republish import republish

from vlmbuild import verify
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.cli import COMMANDS


def test_build_inspect_verify(run, checkpoint, nf4, tmp_path):
    options = ("--quantize", "nf4", "--dtype", "float32", "--require", "fuse_rope")
    code, out, err = run("build", checkpoint, "-o", tmp_path / "out", *options, "--json")
    assert code == 0, err
    built = json.loads(out)
    assert built["id"] == verify(tmp_path / "out").id
    assert {entry["name"]: entry["matches"] for entry in built["passes"]}["quantize_linear"] == 21

    code, out, _ = run("inspect", nf4.path)
    assert code == 0
    for text in (nf4.manifest.id, "language_model.layers", "quantize_linear", "model.safetensors", "nf4", "vision"):
        assert text in out
    document = json.loads(run("inspect", nf4.path, "--json")[1])
    assert document["id"] == nf4.manifest.id
    assert {region["name"]: region["instances"] for region in document["regions"]}["language_model.layers"] == 3

    code, out, _ = run("verify", nf4.path, "--id", nf4.manifest.id)
    assert (code, nf4.manifest.id in out) == (0, True)


def test_text_of_others_moves_no_cursor(run, nf4, tmp_path):
    """In a manifest, and in an error that quotes a name."""
    with ArtifactWriter(tmp_path / "art") as writer:
        writer.write("config.json", b"{}", "config")
        writer.publish(name="m\x1b[2Jx\x9b", target="t\x1b[31m")
    hostile = republish(nf4.path, tmp_path / "other", {}, name="m\x1b[2Jx\x9b")
    for command in (("verify", tmp_path / "art"), ("inspect", hostile), ("run", tmp_path / "art", "--prompt", "x")):
        _, out, err = run(*command)
        assert not {"\x1b", "\x9b"} & set(out + err), command
    assert r"m\x1b[2Jx\x9b" in run("inspect", hostile)[1]


def test_plan_is_for_people_and_machines(run, checkpoint):
    code, out, _ = run("plan", checkpoint, "--quantize", "nf4", "--image", "56x112")
    assert code == 0
    assert "language_model.layers" in out
    assert "role vision keeps its dtype" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert "1 sample of 264 tokens, 1 image in each" in out
    document = json.loads(run("plan", checkpoint, "--quantize", "nf4", "--json", "--batch", 2, "--rank", 8)[1])
    assert (document["memory"]["batch"], document["memory"]["rank"], document["memory"]["tokens"]) == (2, 8, 256)
    assert document["parameters"] == sum(role["parameters"] for role in document["roles"])


def test_recipe_file_and_options_that_win(run, checkpoint, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('dtype = "float32"\nattention = "sdpa"\n[quantize]\nformat = "fp4"\nblocksize = 128\n')
    planned = json.loads(run("plan", checkpoint, "--recipe", recipe, "--attention", "triton", "--json")[1])["recipe"]
    assert planned["dtype"] == "float32"
    assert planned["attention"] == "triton"
    assert planned["quantize"]["format"] == "fp4"
    assert planned["quantize"]["blocksize"] == 128


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_every_wrong_file_is_named(run, nf4, tmp_path):
    bad = shutil.copytree(nf4.path, tmp_path / "bad")
    flip(bad / "model.safetensors")
    (bad / "tokenizer.json").unlink()
    (bad / "surprise").write_text("")
    code, _, err = run("verify", bad)
    assert code == 3
    assert err.startswith("error: ")
    for name in ("model.safetensors", "tokenizer.json", "surprise"):
        assert name in err
    code, out, _ = run("verify", bad, "--json")
    assert json.loads(out)["error"]["exit_code"] == code == 3
    assert run("verify", nf4.path, "--id", "sha256:" + "0" * 64)[0] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("build", "no-such-model", "-o", "{tmp}/out"), 1, "not a directory, a hub id"),
        (("build", "{checkpoint}", "-o", "{checkpoint}"), 1, "--overwrite|exists"),
        (("build", "{checkpoint}", "-o", "{tmp}/no/out"), 1, "no"),
        (("build", "{checkpoint}"), 2, "--output|-o"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--quantize", "nf5"), 2, "nf5"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--recipe", "{tmp}/no.toml"), 2, "no.toml"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--require", "fuse_nothing"), 1, "fuse_nothing"),
        (
            ("build", "{checkpoint}", "-o", "{tmp}/out", "--quantize", "nf4", "--skip", "no.such"),
            2,
            "matches no linear",
        ),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--skip", "*"), 2, "--skip has no effect on source"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--budget", "5"), 2, "--quantize auto"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--quantize", "int8", "--blocksize", "128"), 2, "--blocksize"),
        (
            (
                "build",
                "{checkpoint}",
                "-o",
                "{tmp}/out",
                "--quantize",
                "nf4",
                "--calibrate",
                "{checkpoint}/config.json",
            ),
            2,
            "budget",
        ),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--quantize-module", "*.up_proj"), 2, "not PATTERN=FORMAT"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--quantize", "auto"), 2, "auto needs one"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--quantize", "auto", "--budget", "4.01"), 2, "4.01"),
        (("plan", "{checkpoint}", "--quantize", "auto", "--budget", "5"), 2, "auto measures weights"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--calibrate", "{tmp}/x.jsonl"), 2, "x.jsonl"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--adapter", "{tmp}/x"), 2, "'{tmp}/x'"),
        (("build", "{checkpoint}", "-o", "{tmp}/out", "--adapter", "{checkpoint}"), 1, "no adapter_config.json"),
        (("plan", "{checkpoint}", "--image", "{tmp}/x.png"), 2, "--image {tmp}/x.png: there is no such file"),
        (("plan", "{checkpoint}", "--require", "fuse_nothing"), 1, "fuse_nothing"),
        (("plan", "{checkpoint}", "--image", "{checkpoint}/config.json"), 2, "cannot be read as an image"),
        (("plan", "{checkpoint}", "--target", "aoti"), 2, "target aoti cannot be trained.*--target"),
        (("plan", "{checkpoint}", "--target", "onnx", "--batch", "2"), 2, "--batch.*--target"),
        (("plan", "{tmp}"), 1, "config.json"),
        (("lock", "{checkpoint}", "-o", "{tmp}"), 1, "{tmp} cannot be written"),
        (("inspect", "{checkpoint}", "--html", "{tmp}"), 1, "{tmp} cannot be written"),
        (("verify", "{tmp}"), 3, "manifest.json"),
        (("inspect", "{tmp}/missing"), 3, "missing"),
        (("teach",), 2, "No such command"),
    ],
)
def test_mistakes_are_one_paragraph_and_leave_nothing(run, arguments, code, message, checkpoint, tmp_path):
    import re

    filled = [argument.format(checkpoint=checkpoint, tmp=tmp_path) for argument in arguments]
    found, out, err = run(*filled)
    assert (found, out) == (code, "")
    assert re.search(message.format(checkpoint=checkpoint, tmp=tmp_path), err), err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_unexpected_errors_say_how_to_see_more(run, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("vlmbuild.builder.build.build", lambda *_, **__: 1 / 0)
    code, _, err = run("build", checkpoint, "-o", tmp_path / "out")
    assert code == 1
    assert "VLMBUILD_TRACEBACK=1" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_fits_a_terminal(run, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(command, "--help")
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert f"vlmbuild {command}" in out.partition("Example")[2]
    assert "--json" in out


@pytest.mark.parametrize(("number", "stage", "code"), [(signal.SIGTERM, "capture", 143), (signal.SIGINT, "start", 130)])
def test_interrupted_build_leaves_nothing(number, stage, code, checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    command = [sys.executable, "-m", "vlmbuild", "build", str(source), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=interruptible)
    shown = b""
    while stage.encode() not in shown:
        shown += process.stderr.read(1)
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in err and b"error: interrupted" in err
    assert b"stopped\n" in err  # ends the line of the stage
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_demo_leaves_no_folder(number, code, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "vlmbuild", "demo"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=interruptible,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = process.stdout.readline().split()[-1].removesuffix(".")
    assert os.path.isdir(folder) and folder.startswith(str(tmp_path))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.lstrip().startswith("error: interrupted"), os.path.exists(folder)) == (
        code,
        True,
        False,
    )


def test_the_first_help_fits_a_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert [line for line in run("--help")[1].splitlines() if len(line) > 80] == []


def test_version(run):
    assert run("--version")[1].startswith("vlmbuild")
