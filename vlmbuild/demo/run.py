"""The demo: plan, build in 4 bits, verify, load, fine-tune on a new question, and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmbuild.artifact.reader import verify
from vlmbuild.builder.build import build
from vlmbuild.demo.digits import Digits, Sample
from vlmbuild.demo.task import LARGEST, READ, answers, exact_match, training_batch
from vlmbuild.errors import OutputError
from vlmbuild.planner.plan import plan
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.runtime.load import load
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.train.audit import audit_gradients
from vlmbuild.train.lora import add_lora, save_adapter
from vlmbuild.zoo import CHECKPOINTS

PUBLISHED = {
    "qwen2_vl": "Qwen/Qwen2-VL-2B-Instruct",
    "mllama": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "pixtral": "mistral-community/pixtral-12b",
    "qwen3_vl": "Qwen/Qwen3-VL-2B-Instruct",
    "smolvlm": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
}
SEED = 0
RANK = 16
HELD_OUT = 200
SHOWN = 6

_ON_YOUR_OWN_MODEL = """
The same on your own model:

    vlmbuild build {source} -o my-model-nf4 --quantize nf4
    vlmbuild verify my-model-nf4

    import torch, vlmbuild
    model, processor = vlmbuild.load("my-model-nf4", device="cuda")
    vlmbuild.add_lora(model, r=16)
    model.train()
    collator = vlmbuild.VisionDataCollator(processor)   # chat messages with images; loss on the responses
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for batch in torch.utils.data.DataLoader(your_data, batch_size=4, shuffle=True, collate_fn=collator):
        model(**batch).loss.backward()
        optimizer.step(); optimizer.zero_grad()
    vlmbuild.save_adapter(model, "my-adapter")          # PEFT's format
"""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        artifact: Folder of the NF4 artifact.
        artifact_id: Id of the artifact.
        adapter: Folder of the trained adapter, in PEFT's format.
        before: Accuracy on the new question before fine-tuning, on held-out images.
        after: Accuracy on the new question after fine-tuning.
        reading: Accuracy on the question that the checkpoint was trained on.
        seconds: Total time in seconds.
    """

    artifact: Path
    artifact_id: str
    adapter: Path
    before: float
    after: float
    reading: float
    seconds: float


def run(
    output: Path,
    *,
    family: str = "qwen2_vl",
    steps: int = 250,
    echo: Callable[[str], None] = print,
) -> DemoResult:
    """Run the whole pipeline on a packaged checkpoint, without network or GPU.

    Args:
        output: Folder for the artifact and the adapter; created if it is missing.
        family: Key of `vlmbuild.zoo.CHECKPOINTS`.
        steps: Number of training steps.
        echo: Called with each line of the report.

    Raises:
        OutputError: The folder cannot be created or written.
    """
    started = time.perf_counter()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # more threads do not speed up a model this small
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be created: {error.strerror}. Choose another folder with -o.") from error
    checkpoint, recipe = CHECKPOINTS[family], Recipe(quantize=QuantSpec(), dtype="float32")
    artifact, adapter = output / f"{checkpoint}-nf4", output / f"{checkpoint}-adapter"

    echo(f"[1/6] Plan: {checkpoint}, from its config.json alone")
    planned = plan(checkpoint, recipe)
    repeated = [f"{region['name']} x {region['instances']}" for region in planned.regions if region["instances"] > 1]
    echo(f"      {planned.parameters:,} parameters, {planned.weight_bytes / 1e6:.2f} MB of weights as NF4")
    echo(f"      {len(planned.regions)} distinct graphs; repeated blocks: {', '.join(repeated)}")
    echo(f"[2/6] Build: vlmbuild build {checkpoint} -o {artifact.name} --quantize nf4 --dtype float32")
    for report in build(checkpoint, artifact, recipe, overwrite=True).reports:
        echo(f"      {report.name:16} {report.matches:4} matches")
    echo(f"[3/6] Verify: vlmbuild verify {artifact.name}")
    manifest = verify(artifact)
    echo(f"      {len(manifest.files)} files, {manifest.total_bytes / 1e6:.1f} MB, {manifest.id}")

    echo("[4/6] Load, and ask a question that it was trained on and a new one")
    model, processor = load(artifact, verify=False)
    assert isinstance(model, VisionLanguageModel)  # of the recipe's target
    samples = Digits("held_out", SEED + 5).take(HELD_OUT)
    reading = exact_match(model, processor, READ, samples)
    before = exact_match(model, processor, LARGEST, samples)
    echo(f'      "{READ.question}" {reading:.1%} correct on {HELD_OUT} held-out images')
    echo(f'      "{LARGEST.question}" {before:.1%} correct')
    first_answers = answers(model, processor, LARGEST, samples[:SHOWN])

    echo(f"[5/6] Fine-tune with QLoRA: rank {RANK} on the 4-bit layers, {steps} steps of 32 images")
    add_lora(model, r=RANK)
    _fine_tune(model, processor, steps, echo)
    save_adapter(model, adapter)
    echo(f"      adapter saved to {adapter}")

    echo("[6/6] Ask again")
    after = exact_match(model.eval(), processor, LARGEST, samples)
    second_answers = answers(model, processor, LARGEST, samples[:SHOWN])
    for line in _table(samples[:SHOWN], first_answers, second_answers):
        echo(f"      {line}")
    seconds = time.perf_counter() - started
    echo(f'      "{LARGEST.question}" {before:.1%} before, {after:.1%} after, on {HELD_OUT} held-out images')
    echo(f"Done in {seconds:.0f} s.")
    echo(_ON_YOUR_OWN_MODEL.format(source=PUBLISHED[family]))
    return DemoResult(artifact, manifest.id, adapter, before, after, reading, seconds)


def _fine_tune(model: Any, processor: Any, steps: int, echo: Callable[[str], None]) -> None:
    parameters = [parameter for _, parameter in model.trainable_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    stream = Digits("train", SEED + 7, augment=True)
    model.train()
    echo(f"      {sum(parameter.numel() for parameter in parameters):,} trainable parameters")
    echo(f"      {audit_gradients(model, training_batch(processor, LARGEST, stream.take(4)))}")
    started = time.perf_counter()
    for step in range(1, steps + 1):
        loss = model(**training_batch(processor, LARGEST, stream.take(32))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step in (1, steps):
            echo(f"      step {step:4}  loss {loss.item():.3f}  {time.perf_counter() - started:4.0f} s")


def _table(samples: Sequence[Sample], first: Sequence[str], second: Sequence[str]) -> list[str]:
    rows = [f"{'digits on the image':20} {'largest':8} {'before':10} after"]
    for sample, old, new in zip(samples, first, second, strict=True):
        digits = " ".join(map(str, sample.digits))
        rows.append(f"{digits:20} {LARGEST.answer(sample.digits):8} {old or '(nothing)':10} {new or '(nothing)'}")
    return rows
