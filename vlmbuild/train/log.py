"""The log of a training run: loss, tokens and samples per second, peak memory, and how often torch.compile has compiled."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from vlmbuild.errors import OutputError

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class LogEntry:
    """What was trained since the entry before.

    Attributes:
        step: Optimizer steps so far.
        loss: As given.
        tokens: Since the entry before.
        tokens_per_second: Since the entry before.
        samples_per_second: Since the entry before; None where samples are not counted.
        peak_memory: Bytes, of this process since its start: on a GPU the most that torch has allocated, on a CPU the largest
            resident size.
        compilations: Graphs that torch.compile has compiled in this process.
    """

    step: int
    loss: float
    tokens: int
    tokens_per_second: float
    samples_per_second: float | None
    peak_memory: int
    compilations: int

    def __str__(self) -> str:
        samples = "" if self.samples_per_second is None else f"  {self.samples_per_second:,.1f} samples/s"
        return (
            f"step {self.step:>6}  loss {self.loss:.4f}  {self.tokens_per_second:,.0f} tokens/s{samples}  "
            f"peak {self.peak_memory / 2**20:,.0f} MiB  {self.compilations} compilations"
        )


class TrainingLog:
    """Call `step` after every optimizer step; the clock starts when the log is made, or with `start`.

    Args:
        path: A file that gets a line of JSON for each entry, after those that it has.
        show: What is done with an entry's text; None shows nothing.

    Attributes:
        entries: All so far.
    """

    def __init__(self, path: str | Path | None = None, show: Callable[[str], object] | None = print) -> None:
        self.path = None if path is None else Path(path)
        self.show = show
        self.entries: list[LogEntry] = []
        self.start()

    def start(self) -> None:
        """Start the clock anew: what was done before belongs to no entry."""
        self._since = time.perf_counter()

    def step(
        self, tokens: int, loss: float | torch.Tensor, samples: int | None = None, step: int | None = None
    ) -> LogEntry:
        """Add an entry.

        Args:
            tokens: Trained since the entry before, without padding.
            loss: To be shown; reading a tensor's value waits for the GPU.
            samples: Trained since the entry before.
            step: Its number; None is one more than the last.

        Raises:
            OutputError: The file cannot be written.
        """
        loss = float(loss)
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        last = self.entries[-1].step if self.entries else 0
        entry = LogEntry(
            step=last + 1 if step is None else step,
            loss=loss,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            samples_per_second=None if samples is None else samples / seconds,
            peak_memory=peak_memory(),
            compilations=counters["stats"]["unique_graphs"],
        )
        self.entries.append(entry)
        self._write(entry)
        if self.show is not None:
            self.show(str(entry))
        return entry

    def _write(self, entry: LogEntry) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        except OSError as error:
            raise OutputError(
                f"The training log cannot be written to {self.path}: {error}. Choose another file."
            ) from error


def peak_memory() -> int:
    """Bytes that this process has used at most: allocated by torch on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():  # what getrusage says, a process inherits from the one that started it
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
