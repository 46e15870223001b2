"""Record golden cases: run a program in float32 on prompts, and on a few tokens after each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.artifact.paths import GENERATION_CONFIG
from vlmbuild.errors import IncompatibleError
from vlmbuild.families import Family, family_named
from vlmbuild.golden.cases import PIXEL_VALUES, GoldenCase, packaged_cases
from vlmbuild.golden.sample import LAST, Sample, sample
from vlmbuild.golden.stages import EMBEDDINGS, FEATURES, LOGITS, PIXELS, modules, places
from vlmbuild.golden.weights import WEIGHTS
from vlmbuild.ir.program import Program
from vlmbuild.ir.serialize import PROGRAM_FILE, from_json
from vlmbuild.kv_cache.program import CROSS, MASK, PAST, STEP, TOKENS, present_name, with_cache
from vlmbuild.measure.reference import Reference, SlotWeights, State
from vlmbuild.util.cpu import single_threaded
from vlmbuild.util.progress import Progress, silent

STEPS = 8
"""Tokens that are generated for each case."""
_TOP = 16
"""Tokens whose log-probabilities are kept, for engines that show no logits."""


@dataclass(frozen=True, slots=True)
class GoldenRecord:
    """Results of the program on one case.

    Attributes:
        case: The prompt.
        text: The prompt as the chat template writes it.
        tokens: Its tokens, image tokens included.
        samples: Samples of the values, by stage.
        modules: Module and side of it where transformers computes a stage.
        greedy: Tokens that follow, each the most probable, up to an end of the text.
        margins: For each, how much more its logit is than the next one's, as a share of the root mean square of all.
        top: Log-probabilities of the most probable tokens at the end of the prompt.
        template: Whether the chat template wrote the prompt; a base model has none.
    """

    case: GoldenCase
    text: str
    tokens: list[int]
    samples: dict[str, Sample]
    modules: dict[str, tuple[str, str]]
    greedy: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    top: dict[int, float] = field(default_factory=dict)
    template: bool = True


def record_artifact(
    directory: Path,
    target: str,
    cases: Sequence[GoldenCase] = (),
    *,
    weights: SlotWeights | None = None,
    progress: Progress = silent,
) -> list[GoldenRecord]:
    """Record the cases of an artifact whose files are complete in a directory.

    Args:
        directory: The artifact, or a build's staging directory.
        target: Target of its recipe.
        cases: The prompts; empty for the packaged ones.
        weights: Its weights; None opens them as `WEIGHTS` says.
        progress: Called with the number of passes over the weights that are done.

    Raises:
        IncompatibleError: The target has no weights that a program reads.
        SourceError: The processor cannot make a case.
    """
    program = from_json(json.loads((directory / PROGRAM_FILE).read_text(encoding="utf-8")))
    family = family_named(program.family)
    config = family.config(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    if weights is None:
        if target not in WEIGHTS:
            raise IncompatibleError(
                f"{directory} has the target {target}, and golden cases are recorded for {', '.join(WEIGHTS)}. Choose one."
            )
        weights = WEIGHTS[target](directory, family)
    return record(
        program, family, config, family.processor(directory), weights, cases, ends_of(directory, config), progress
    )


def record(
    program: Program,
    family: Family,
    config: Any,
    processor: Any,
    weights: SlotWeights,
    cases: Sequence[GoldenCase] = (),
    ends: frozenset[int] = frozenset(),
    progress: Progress = silent,
) -> list[GoldenRecord]:
    """Record what a program computes, one block's weights in memory at a time.

    Args:
        program: After its passes.
        family: The program's family.
        config: From the family's `config`.
        processor: The artifact's.
        weights: The artifact's, as stored.
        cases: The prompts; empty for the packaged ones.
        ends: Tokens after which a generation ends.
        progress: Called with the number of passes over the weights that are done.
    """
    with single_threaded() as start:  # sums are in one order, so the figures do not depend on the number of cores
        start()
        reference = Reference(with_cache(program), family, config, weights)
        template = bool(getattr(processor, "chat_template", None))
        runs = [
            _Run(reference, family, case, case.batch(processor), case.text(processor), template)
            for case in cases or packaged_cases()
        ]
        for number in range(STEPS):
            progress("golden", number, STEPS)
            _advance(reference, [run for run in runs if not run.ended(ends)])
        progress("golden", STEPS, STEPS)
    return [run.record for run in runs]


class _Run:
    """The generation of a case.

    Attributes:
        record: The result, which grows.
        variant: Variant of the next pass.
        state: Its inputs.
        keep: Value's name -> stage, of the prompt's pass.
    """

    def __init__(
        self,
        reference: Reference,
        family: Family,
        case: GoldenCase,
        batch: Mapping[str, Tensor],
        text: str,
        template: bool,
    ) -> None:
        self._program = reference.program
        self.variant, self.state = reference.inputs(batch)
        found = places(self._program, family, self._program.variants[self.variant])
        self.keep = {place.value: stage for stage, place in found.items()}
        samples = {PIXELS: sample(PIXELS, batch[PIXEL_VALUES].numpy())} if PIXEL_VALUES in batch else {}
        tokens = batch["input_ids"][0].tolist()
        self.record = GoldenRecord(case, text, tokens, samples, modules(found), template=template)
        self._prompt, self._entries = self.state, self._program.variants[self.variant].inputs
        self._position = int(self.state["position_ids"].max())

    def ended(self, ends: frozenset[int]) -> bool:
        """Tell whether the last token ends the text."""
        return bool(self.record.greedy) and self.record.greedy[-1] in ends

    def take(self, results: State) -> None:
        """Take the results of a pass, and make the inputs of the next one."""
        logits = results[self._program.variants[self.variant].output].flatten(0, -2)
        if self.keep:
            self._sample(results, logits)
            self._held = {name: value for name, value in results.items() if name.startswith(CROSS)}
            self.keep = {}
            if self.variant != "text":
                self.variant = STEP if STEP in self._program.variants else "text"
        best = logits[-1].topk(2)
        self.record.greedy.append(int(best.indices[0]))
        self.record.margins.append(float((best.values[0] - best.values[1]) / logits[-1].square().mean().sqrt()))
        self._position += 1
        self.state = self._next(results, len(self.record.tokens) + len(self.record.greedy))

    def _sample(self, results: State, logits: Tensor) -> None:
        for name, stage in self.keep.items():
            width = results[self._embeddings].shape[-1] if stage == FEATURES else None
            self.record.samples[stage] = sample(stage, results[name].numpy(), width)
        self.record.samples[LOGITS] = sample(LOGITS, logits[-LAST:].numpy())
        most = logits[-1].log_softmax(-1).topk(min(_TOP, logits.shape[-1]))
        self.record.top.update(zip(most.indices.tolist(), most.values.tolist(), strict=True))

    @property
    def _embeddings(self) -> str:
        return next(name for name, stage in self.keep.items() if stage == EMBEDDINGS)

    def _next(self, results: State, total: int) -> State:
        """Return the inputs of a step: the last token, and what each of the prompt's tokens has, as the last one had it."""
        state: State = {}
        shapes = {entry.name: entry.shape for entry in self._entries}
        for entry in self._program.variants[self.variant].inputs:
            name = entry.name
            if name == "input_ids":
                state[name] = torch.tensor([[self.record.greedy[-1]]])
            elif name == "position_ids":
                state[name] = torch.full_like(self._prompt[name][..., -1:], self._position)
            elif name == MASK:
                state[name] = torch.ones(1, total, dtype=torch.int64)
            elif name.startswith(PAST):
                state[name] = results[present_name(name)]
            elif name.startswith(CROSS):
                state[name] = self._held[name]
            elif TOKENS in shapes[name]:
                state[name] = self._prompt[name].narrow(shapes[name].index(TOKENS), -1, 1)
            else:
                state[name] = self._prompt[name]
        return state


def _advance(reference: Reference, runs: Sequence[_Run]) -> None:
    """Compute the next token of every case; cases of one variant share a pass over the weights."""
    by_variant: dict[str, list[_Run]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    for name, together in by_variant.items():
        keep = {value for run in together for value in run.keep}
        variant = reference.program.variants[name]
        results = reference.run_together(variant, [run.state for run in together], keep)
        for run, found in zip(together, results, strict=True):
            run.take(found)


def ends_of(directory: Path, config: Any) -> frozenset[int]:
    """Read the tokens after which transformers' generation ends."""
    file = directory / GENERATION_CONFIG
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ends = values.get("eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))
    return frozenset([ends] if isinstance(ends, int) else ends or ())
