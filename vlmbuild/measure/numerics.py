"""Compare exported models with the program: the same batches through both, in a separate process."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmbuild.errors import IncompatibleError, ParityError, VlmbuildError
from vlmbuild.families import Family
from vlmbuild.kv_cache.program import PRESENT
from vlmbuild.measure.batches import Case, extended
from vlmbuild.util.child import ChildProcess
from vlmbuild.util.progress import Progress

STEPS = 4
"""Tokens that are generated for each case."""

Record = dict[str, Any]


class Stepwise(Protocol):
    """Runs a batch, then the tokens after it, with a cache."""

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute logits (batch, tokens, vocabulary)."""


class Measurement(ChildProcess):
    """A context with a process that makes itself ready while something else is done, and then measures.

    Args:
        module: `python -m MODULE DIRECTORY DTYPE` runs `print_records`.
        directory: Artifact, which is complete when `records` is called.
        dtype: Name of the compute dtype.
        what: Name of the measured thing, for messages.
    """

    def __init__(self, module: str, directory: Path, dtype: str, what: str) -> None:
        super().__init__(module, str(directory), dtype)
        self._what = what

    def records(self, progress: Progress) -> list[Record]:
        """Measure the export, which is complete now, and return the manifest's records.

        Args:
            progress: Called at the beginning and at the end.

        Raises:
            IncompatibleError: The export cannot run here.
            ParityError: The export does not run, or computes something else than the program.
        """
        progress("numerics", 0, 1)
        self.ask("\n")
        printed = list(self.answers())
        code, said = self.last_words()
        if code == IncompatibleError.exit_code:
            raise IncompatibleError(said[-1])
        if code:
            reason = said[-1] if said else f"the process ended with {code}"
            raise ParityError(
                f"{self._what} could not be run beside the program: {reason} Free memory if there was too little, put the "
                "model's own processor into the checkpoint if batches do not fit, else report it."
            )
        records: list[Record] = json.loads(printed[-1])
        check_records(records, self._what)
        progress("numerics", 1, 1)
        return records


def check_records(records: list[Record], what: str) -> None:
    """Raise ParityError for an output whose error is above its tolerance, or is no number."""
    for record in records:
        error, limit = float(record["error"]), float(record["tolerance"])
        if not math.isfinite(error) or error > limit:
            raise ParityError(
                f"{what} differ from the program: case {record['case']!r}, output {record['output']}: relative error "
                f"{record['error']}, and at most {record['tolerance']} is allowed. Build with "
                "--dtype float32 or without --quantize; if that fails too, report it."
            )


def print_records(prepare: Callable[[], Callable[[], list[Record]]]) -> int:
    """Prepare, wait for a line on stdin, and print the records, or on stderr why there are none; returns the exit code."""
    try:
        measure = prepare()
        if not sys.stdin.readline():  # there is nothing to measure after all
            return 0
        print(json.dumps(measure()))
    except VlmbuildError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    return 0


def stepwise(case: Case, decoding: Stepwise, family: Family) -> tuple[dict[str, Tensor], Tensor]:
    """Run a prompt and some tokens after it, each the most probable.

    Returns:
        The batch with these tokens, and the logits of all its tokens (batch, sequence, vocabulary).
    """
    logits, batch = [decoding.logits(case.batch)], dict(case.batch)
    for _ in range(STEPS):
        token = logits[-1][:, -1:].argmax(-1)
        batch = extended(batch, token, family)
        logits.append(decoding.logits({"input_ids": token, "attention_mask": batch["attention_mask"]}))
    return batch, torch.cat(logits, 1)


def compare(
    case: str, batch: Mapping[str, Tensor], found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> list[Record]:
    """Compare the outputs of a case, whose batch has the generated tokens: logits, with counts of equal tokens, and the
    worst of each other kind of output. Where the program pads rows, the first ones count."""
    shown = batch["attention_mask"].bool()
    top = [values["logits"].argmax(-1) for values in (found, expected)]
    record = _errors(case, "logits", found["logits"][shown], expected["logits"][shown])
    record |= {
        "tokens": int(shown.sum()),
        "top1": int((top[0] == top[1])[shown].sum()),
        "generated": top[1][:, -STEPS - 1 : -1].numel(),
        "greedy": int((top[1][:, -STEPS - 1 : -1] == batch["input_ids"][:, -STEPS:]).sum()),
    }
    others = []
    for name in sorted(expected.keys() - {"logits"}):
        mine, theirs = found[name], expected[name]
        if name.startswith(f"{PRESENT}."):
            mine, theirs = (x.transpose(1, 2)[shown] for x in (mine, theirs))
        others.append(_errors(case, name, mine, theirs[: len(mine)]))
    return [record, *_worst(others)]


def _errors(case: str, output: str, found: Tensor, expected: Tensor) -> Record:
    difference = found.double() - expected.double()
    error = float(difference.norm() / expected.double().norm())
    return {"case": case, "output": output, "error": f"{error:.1e}", "max": f"{float(difference.abs().max()):.1e}"}


def _worst(records: list[Record]) -> list[Record]:
    """Keep the worst record of each kind of output that every layer has."""
    kinds: dict[str, Record] = {}
    for record in records:
        kind = record["output"].partition(".")[0]
        if kind not in kinds or not float(record["error"]) <= float(kinds[kind]["error"]):
            kinds[kind] = record
    return list(kinds.values())
