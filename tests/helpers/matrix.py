"""The parity matrix: tiny models of every family on what users send them, against transformers on the same weights.

Real tokenizers, chat templates and photographs (`processors.py`); only the models are tiny and their weights random, with
gates, norms and biases away from the values at which a gradient would vanish.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import processors
import torch
from parity import CANCELLED, relative
from PIL import Image
from processors import photographs
from samples import SAMPLES
from torch.overrides import TorchFunctionMode
from traces import traced
from transformers.image_utils import SizeDict

from vlmbuild.families import FAMILIES, Family
from vlmbuild.ir.program import Program
from vlmbuild.passes import passes_for
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.train.collator import VisionDataCollator

__all__ = [
    "SETUPS",
    "Setup",
    "batch",
    "bind",
    "conversations",
    "errors",
    "photographs",
    "program",
    "reference",
    "replace",
    "tiny",
]

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setup:
    """A family's tiny model and real processor.

    Attributes:
        family: The family.
        values: Values of a tiny config.json.
        processor: Real, with its image processor's `size` lowered.
        largest, smallest: Images that it takes (width, height).
        media: Tokens that it writes for an image.
        vocabulary: The processor's ids that the model has; None for all.
    """

    family: Family
    values: dict[str, Any]
    processor: Any
    largest: tuple[int, int]
    smallest: tuple[int, int]
    media: tuple[str, ...]
    vocabulary: torch.Tensor | None = None

    def config(self) -> Any:
        return self.family.config(self.values)

    def ids(self, tokens: Sequence[str]) -> torch.Tensor:
        """Look up the model's ids of special tokens."""
        return self.shrunk(torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(list(tokens))))

    def shrunk(self, ids: torch.Tensor) -> torch.Tensor:
        """Renumber the processor's ids as the model has them."""
        if self.vocabulary is None:
            return ids
        assert torch.isin(ids, self.vocabulary).all()  # searchsorted would take a neighbour
        return torch.searchsorted(self.vocabulary, ids)


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


_TEXT = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


def _setup(name: str, size: dict[str, int], values: dict[str, Any], **limits: Any) -> Setup:
    """Make the setup of a family whose image processor has this `size`."""
    family, processor = FAMILIES[name], copy.copy(getattr(processors, name)())
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.size = SizeDict(**size)
    values = {"architectures": list(family.architectures), **values, "text_config": _TEXT | values["text_config"]}
    return Setup(family, values, processor, **limits)


def qwen2_vl(full: bool) -> Setup:
    """Make the setup; `full` raises the limit to the processor class's 1280 tokens per image."""
    values = {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "bos_token_id": None,
        "eos_token_id": None,
        "text_config": {
            "vocab_size": 151936,
            "num_hidden_layers": 3,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
        },
        "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2},
    }
    size = {"shortest_edge": 56 * 56, "longest_edge": (1280 if full else 80) * 28 * 28}
    return _setup("qwen2_vl", size, values, largest=(3000, 2000), smallest=(20, 20), media=("<|image_pad|>",))


def mllama(full: bool) -> Setup:
    """Make the setup; `full` has the published tiles of 560 pixels, else 112."""
    side = 560 if full else 112
    values = {
        "model_type": "mllama",
        "image_token_index": 128256,
        "text_config": {
            "vocab_size": 128256,
            "num_hidden_layers": 5,
            "cross_attention_layers": [1, 3],
            "pad_token_id": 128004,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        "vision_config": {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_global_layers": 2,
            "attention_heads": 2,
            "intermediate_size": 96,
            "image_size": side,
            "patch_size": 14,
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 192,
        },
    }
    size = {"height": side, "width": side}
    return _setup("mllama", size, values, largest=(4 * side, 4 * side), smallest=(1, 1), media=("<|image|>",))


def pixtral(full: bool) -> Setup:
    """Make the setup; `full` has the published longest edge of 1024 pixels, else 192."""
    edge = 1024 if full else 192
    values = {
        "model_type": "llava",
        "image_token_index": 10,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 131072,
            "num_hidden_layers": 3,
            "head_dim": 64,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "patch_size": 16,
            "image_size": 1024,
            "hidden_act": "silu",
        },
    }
    media = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return _setup("pixtral", {"longest_edge": edge}, values, largest=(2 * edge, 2 * edge), smallest=(1, 1), media=media)


SETUPS: dict[str, Callable[[bool], Setup]] = {"qwen2_vl": qwen2_vl, "mllama": mllama, "pixtral": pixtral}
"""Family -> its tiny model and real processor; everything that tests of all families need. `full` has published image sizes."""


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
            elif "positional_embedding" in name or "class_embedding" in name:
                parameter.normal_(std=0.3)
            elif "embed_tokens" not in name and "lm_head" not in name:
                parameter.mul_(3)  # images must matter to the logits
    return model


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
