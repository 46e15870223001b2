"""The parity matrix: tiny models of every family on what users send them, against transformers on the same weights.

Real tokenizers, chat templates and photographs (`setups/`); only the models are tiny and their weights random, with
gates, norms and biases away from the values at which a gradient would vanish.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from parity import CANCELLED, relative
from PIL import Image
from processors import photographs
from samples import SAMPLES
from setups import KINDS, SETUPS, Setup
from torch.overrides import TorchFunctionMode
from traces import traced

from vlmbuild.ir.program import Program
from vlmbuild.passes import passes_for
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.train.collator import VisionDataCollator

__all__ = [
    "KINDS",
    "SETUPS",
    "Setup",
    "batch",
    "bind",
    "conversations",
    "copied",
    "errors",
    "kinds",
    "of_kinds",
    "photographs",
    "positioned",
    "program",
    "reference",
    "replace",
    "tiny",
]

Batch = dict[str, torch.Tensor]


def kinds() -> list[Any]:
    """Parametrize by family; the others of a kind that has one are for releases."""
    return [pytest.param(name, marks=[pytest.mark.release] * (name not in KINDS)) for name in SETUPS]


def of_kinds(test: Any) -> Any:
    """Mark a test, in a file that is for all families, which takes one family of each kind, and all before a release."""
    return pytest.mark.parametrize("setup", kinds(), indirect=True, scope="module")(test)


def shrink(setup: Setup) -> Setup:
    """Reduce the vocabulary to the tokens of conversations and samples: a real one costs most of a tiny model's time."""
    whole = [batch(setup, *said)[0]["input_ids"].unique() for said in conversations(setup).values()]
    whole.append(VisionDataCollator(setup.processor)(SAMPLES)["input_ids"].unique())
    tokens = {key: value for key, value in setup.values.items() if "token_" in key and value is not None}
    small = replace(setup, vocabulary=torch.cat([*whole, torch.tensor([*tokens.values()])]).unique())
    assert small.vocabulary is not None
    ids = {key: int(small.shrunk(torch.tensor(value))) for key, value in tokens.items()}
    size = len(small.vocabulary) - bool(setup.family.extra_embedding_rows)  # an image token after it stays there
    text = {**setup.values["text_config"], "vocab_size": size, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return replace(small, values={**setup.values, **ids, "text_config": text})


@cache
def tiny(name: str) -> Setup:
    """Return a family's tiny setup with a small vocabulary, shared by all tests of a process; nobody may change it."""
    return shrink(SETUPS[name](False))


Conversation = list[str | Image.Image]


def conversations(setup: Setup) -> dict[str, tuple[list[Conversation], str]]:
    """Map name -> messages of the users (texts and images in order) and the padding side."""
    photo = photographs()
    counts: list[Conversation] = [
        ["Compare", photo["astronaut"], "with", photo["coffee"], "and say which is older."],
        ["What is this?", photo["rocket"]],
        ["Name three planets and their moons, please."],
    ]
    largest, smallest = (photo["retina"].resize(size) for size in (setup.largest, setup.smallest))
    return {
        "one image": ([["What is in the picture?", photo["chelsea"]]], "right"),
        "several sizes": (
            [["First", photo["coffee"], photo["camera"], "then", photo["tall"], "Describe them."]],
            "right",
        ),
        "counts differ, right": (counts, "right"),
        "counts differ, left": (counts, "left"),
        "text only": ([["Name three planets."], ["Write a haiku about a café in 北京."]], "left"),
        "very wide": ([["Look:", photo["wide"]], ["Hello!"]], "right"),
        "very tall": ([[photo["tall"], "Look!"]], "right"),
        "smallest": ([[smallest, "What colour?", photo["rocket"].resize((60, 90))]], "right"),
        "largest": ([[largest, "What organ?"]], "right"),
    }


def batch(setup: Setup, users: list[Conversation], side: str) -> tuple[Batch, torch.Tensor]:
    """Process the users' messages, with labels on all tokens but media and the first of each row."""
    texts, images = [], []
    for parts in users:
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        messages = [{"role": "user", "content": content}]
        texts.append(setup.processor.apply_chat_template(messages, add_generation_prompt=True))
        images.append([part for part in parts if not isinstance(part, str)])
    pictures = {"images": images} if any(images) else {}
    made = setup.processor(
        text=texts, **pictures, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt"
    )
    inputs = {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}
    ids, mask = setup.shrunk(inputs["input_ids"]), inputs["attention_mask"]
    inputs["input_ids"] = ids
    labels = ids.masked_fill((mask == 0) | torch.isin(ids, setup.ids(setup.media)), -100)
    labels[torch.arange(len(ids)), mask.argmax(1)] = -100  # transformers lets the last pad on the left predict it
    return inputs, labels


def reference(setup: Setup, seed: int = 0) -> Any:
    """Make transformers' model in float32."""
    torch.manual_seed(seed)
    model = setup.family.model_class(setup.config()).float().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() == 1:
                parameter.fill_(0.5)  # tanh gates: at zero, images would change nothing
            elif "norm" in name or "bias" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "input_projection" in name:
                parameter.normal_(std=0.1)  # transformers starts with zeros
            elif ".vision_tower.encoder." in name:
                pass  # SigLIP's are large enough: with larger ones a row of attention has one key
            elif "positional_embedding" in name or "class_embedding" in name:
                parameter.normal_(std=0.3)
            elif not parameter.any():
                parameter.normal_(std=0.3)  # transformers starts with zeros, which would hide what is read wrongly
            elif "embed_tokens" not in name and "lm_head" not in name:
                parameter.mul_(3)  # images must matter to the logits
    return positioned(model)


def positioned(model: Any) -> Any:
    """Let transformers' model not count padding on the left as positions, if it uses absolute ones; its generate never does."""
    if "llama_4_scaling_beta" in model.config.get_text_config().rope_parameters:
        model.register_forward_pre_hook(_add_positions, with_kwargs=True)
    return model


def _add_positions(model: Any, arguments: Any, inputs: dict[str, Any]) -> Any:
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and inputs.get("position_ids") is None:
        inputs = {**inputs, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return arguments, inputs


def program(setup: Setup, **recipe: Any) -> Program:
    """Capture the family's program and run the passes of a recipe."""
    built = traced(setup.family, setup.config())
    run(passes_for(Recipe(**{"dtype": "float32", **recipe})), built)
    return built


def bind(setup: Setup, built: Program, theirs: Any) -> VisionLanguageModel:
    """Bind the program to copies of the reference model's weights."""
    tensors = {name: tensor.detach().clone() for name, tensor in theirs.state_dict().items()}
    model = VisionLanguageModel(built, setup.family, setup.config(), tensors, torch.float32)
    model.processor = setup.processor
    return model.train()


def copied(model: VisionLanguageModel) -> VisionLanguageModel:
    """Copy a model that a test changes; a processor is not copied, since a real vocabulary takes longer than all else."""
    return copy.deepcopy(model, {id(model.processor): model.processor})


Gradients = dict[str, torch.Tensor]


def errors(ours: Any, theirs: Any, inputs: Batch, labels: torch.Tensor) -> dict[str, Any]:
    """Relative errors of logits, loss, the worst gradient and the worst scalar gate against transformers in float64.

    The gradient of a scalar gate sums thousands of terms that cancel. Rounding leaves each term with an error relative to the
    term, so the error of the sum is relative to the sum of their absolute values.
    """
    results, gradients = _step(ours, inputs, labels)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    reference = copy.deepcopy(theirs).double()
    with _GateTerms(reference) as terms:
        expected_results, expected = _step(reference, exact, labels)
    assert gradients.keys() == expected.keys()
    floor = CANCELLED * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert set(terms.norms) == {name for name, gradient in expected.items() if gradient.numel() == 1}
    scales = {name: max(gradient.norm(), floor) for name, gradient in expected.items()} | terms.norms
    error = {name: float((gradients[name] - expected[name]).norm() / scale) for name, scale in scales.items()}
    worst = max(error.keys() - terms.norms.keys(), key=error.__getitem__)
    attended = inputs["attention_mask"].bool()
    return {
        "logits": relative(results.logits[attended], expected_results.logits[attended]),
        "loss": relative(results.loss, _loss(expected_results.logits, labels)),
        "gradient": error[worst],
        "parameter": worst,
        "gradients": sum(bool(gradient.norm() > floor) for gradient in expected.values()),
        "gate": max((error[name] for name in terms.norms), default=0.0),
    }


def _step(model: Any, inputs: Batch, labels: torch.Tensor) -> tuple[Any, Gradients]:
    model.zero_grad(set_to_none=True)
    results = model(**inputs, labels=labels)
    results.loss.backward()
    return results, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the loss in the dtype of the logits; transformers always computes it in float32."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class _GateTerms(TorchFunctionMode):
    """Sum of |dL/dy * x * (1 - tanh(g)^2)| for each scalar gate g with y = tanh(g) * x: its gradient without cancellation."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.numel() == 1}
        self._gates: dict[torch.Tensor, torch.nn.Parameter] = {}
        self.norms: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        gate = next(
            (self._gates.get(value, value) for value in tensors if self._gates.get(value, value) in self._names), None
        )
        if gate is None or not isinstance(result, torch.Tensor):
            return result
        if result.numel() == 1:  # tanh(g), 1 - tanh(g)
            self._gates[result] = gate
        elif result.requires_grad:
            (factor,) = (value for value in tensors if value.numel() > 1)
            result.register_hook(lambda gradient: self._add(gate, gradient * factor.detach()))
        return result

    def _add(self, gate: torch.nn.Parameter, terms: torch.Tensor) -> None:
        with torch.no_grad():
            total = (terms.abs().sum() * (1 - gate.tanh() ** 2)).squeeze()
            self.norms[self._names[gate]] = self.norms.get(self._names[gate], 0) + total
