"""`vlmbuild run`: answers on stdout, and one paragraph for every mistake."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from videos import pan, write_mp4

import vlmbuild
from vlmbuild.builder.build import build
from vlmbuild.checkpoint.source import resolve
from vlmbuild.cli.run import _batch
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import READ
from vlmbuild.errors import UsageError
from vlmbuild.families import family_of
from vlmbuild.recipe import Recipe
from vlmbuild.zoo import ZOO


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A checkpoint that reads digits."""
    return build("qwen2-vl-digits", tmp_path_factory.mktemp("built") / "digits", Recipe(dtype="float32")).path


@pytest.fixture
def run(run):
    """The shared fixture with the command's name before the arguments."""
    return functools.partial(run, "run")


@pytest.fixture(scope="module")
def samples():
    return list(Digits("held_out", seed=5).take(2))


def test_reads_digits_aloud(digits, samples, run, tmp_path):
    samples[0].image.save(tmp_path / "digits.png")
    options = ("--prompt", READ.question, "--max-new-tokens", 8)
    code, out, err = run(digits, "--image", tmp_path / "digits.png", *options)
    assert (code, out, err) == (0, READ.answer(samples[0].digits) + "\n", "")


def test_several_images_sampling_and_json(digits, samples, run, tmp_path):
    for number, sample in enumerate(samples[:2]):
        sample.image.resize((84 + 56 * number, 84)).save(tmp_path / f"{number}.png")
    images = [part for number in (0, 1) for part in ("--image", tmp_path / f"{number}.png")]
    torch.manual_seed(0)
    code, out, err = run(digits, *images, "--prompt", "Hello", "--temperature", 1.5, "--max-new-tokens", 3, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert 1 <= answer["new_tokens"] <= 3 and answer["prompt_tokens"] > 3 and answer["seconds"] > 0


def test_a_video(digits, run, tmp_path):
    clip = write_mp4(tmp_path / "clip.mp4", pan(4), 2)
    code, out, err = run(digits, "--video", clip, "--prompt", READ.question, "--max-new-tokens", 2, "--json")
    assert (code, err) == (0, "")
    _, processor = vlmbuild.load(digits)
    batch = _batch(processor, READ.question, (), [str(clip)])
    assert batch["video_grid_thw"][0, 0] == 2
    assert json.loads(out)["prompt_tokens"] == batch["input_ids"].shape[1] > 12
    pixtral = resolve("pixtral-digits")
    with pytest.raises(UsageError, match="--video"):
        _batch(family_of(pixtral.config(), "").processor(pixtral.directory), "What?", (), [str(clip)])


@pytest.mark.parametrize("name", ZOO)
def test_prompts_of_all_families(name, samples):
    """The answers themselves are tested in `demo/test_zoo.py`."""
    source = resolve(name)
    family = family_of(source.config(), name)
    processor = family.processor(source.directory)
    batch = _batch(processor, "What differs?", [sample.image for sample in samples])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.count("What differs?") == 1 and text.count(processor.tokenizer.bos_token or "What") == 1
    assert torch.isin(batch["input_ids"], torch.tensor(sorted(family.media_tokens(processor)))).sum() >= 2
    assert "pixel_values" in batch


def test_the_artifact_knows_how_answers_end(digits):
    model, _ = vlmbuild.load(digits)
    assert model.generation_config.eos_token_id is not None


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--image", "missing.jpg", "--prompt", "Hello"), 2, "--image missing.jpg: there is no such file"),
        (("--image", ".", "--prompt", "Hello"), 2, "--image .: there is no such file"),
        (("--video", "missing.mp4", "--prompt", "Hello"), 2, "--video missing.mp4: there is no such file"),
        (("--image", __file__, "--prompt", "Hello"), 2, "cannot be read"),
        (("--prompt", "  "), 2, "The prompt is empty"),
        ((), 2, "Missing option '--prompt'"),
        (("--prompt", "Hello", "--max-new-tokens", 0), 2, "--max-new-tokens"),
        (("--prompt", "Hello", "--temperature", -1), 2, "--temperature"),
        (("--prompt", "Hello", "--device", "tpu"), 2, "--device"),
    ],
)
def test_mistakes_are_one_paragraph(options, code, said, plain, run):
    found, out, err = run(plain.path, *options)
    assert (found, out) == (code, "") and said in err and "Traceback" not in err and err.startswith("error: ")


def test_an_image_of_a_shape_that_the_processor_refuses(plain, samples, run, tmp_path):
    samples[0].image.resize((4000, 4)).save(tmp_path / "line.png")
    code, _, err = run(plain.path, "--image", tmp_path / "line.png", "--prompt", "Hello")
    assert code == 2 and "--image: the artifact's processor refuses the images" in err


def test_no_artifact(run, tmp_path):
    code, _, err = run(tmp_path, "--prompt", "Hello")
    assert code != 0 and str(tmp_path) in err and "Traceback" not in err
