"""Rows of a part, written as they are made; timing, and comparison with peers."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
Row = dict[str, Any]
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "peft", "liger_kernel")
LEAST_TRANSFORMERS = (5, 20)


class MissingError(Exception):
    """A row cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """Where parts run.

    Attributes:
        device: "cuda", or "cpu" in the rehearsal.
        dtype: Dtype of activations; Triton's interpreter cannot multiply bfloat16.
        small: True in the rehearsal.
    """

    device: str
    dtype: torch.dtype
    small: bool

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw normal values."""
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype or self.dtype)

    @property
    def backend(self) -> str:
        """Compiler backend; the rehearsal runs torch.compile's front end alone."""
        return "eager" if self.small else "inductor"


class Record:
    """A part's JSON file."""

    def __init__(self, part: str, out: Path, about: Mapping[str, Any]) -> None:
        self.file = out / f"{part}.json"
        self.content: Row = {"part": part, "status": "running", **about, "rows": []}
        self.started = time.perf_counter()
        self.write()

    @property
    def rows(self) -> list[Row]:
        """Rows so far."""
        return self.content["rows"]  # type: ignore[no-any-return]

    @contextmanager
    def row(self, title: str, **facts: Any) -> Iterator[Row]:
        """Collect a row: an error becomes its "failed" or "skipped", and never reaches the next row."""
        row: Row = facts | {"name": title}
        started = time.perf_counter()
        try:
            yield row
        except (MissingError, ModuleNotFoundError) as error:
            row["skipped"] = reason_of(error)
        except Exception as error:
            row["skipped" if _is_old_transformers() else "failed"] = reason_of(error)
            row["trace"] = traceback.format_exc()[-1500:]
        row["seconds"] = round(time.perf_counter() - started, 2)
        self.rows.append(row)
        self.write()

    def close(self) -> None:
        """Decide the status."""
        failed = any("failed" in row or row.get("right") is False for row in self.rows)
        skipped = sum("skipped" in row for row in self.rows)
        some = "partial" if skipped < len(self.rows) else "skipped"
        self.content["status"] = "failed" if failed else some if skipped else "ok"
        self.write()

    def write(self) -> None:
        self.content["seconds"] = round(time.perf_counter() - self.started, 1)
        beside = self.file.with_suffix(".tmp")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        beside.replace(self.file)


def reason_of(error: BaseException) -> str:
    """Render an error in one line, with a remedy for a missing package or old transformers."""
    if isinstance(error, MissingError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; add its wheel to WHEELS (measure.sh --wheels)"
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if _is_old_transformers():
        least = ".".join(map(str, LEAST_TRANSFORMERS))
        return f"transformers {version('transformers')} is older than {least}; add its wheel to WHEELS. {text}"
    return text


def _is_old_transformers() -> bool:
    found = version("transformers")
    return found == "absent" or tuple(map(int, found.split(".")[:2])) < LEAST_TRANSFORMERS


def version(package: str) -> str:
    """Return a distribution's version, or "absent"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def timed(setting: Setting, call: Run) -> Row:
    """Median, 20 % and 80 % quantiles in milliseconds; in the rehearsal of one call."""
    if setting.small:
        started = time.perf_counter()
        call()
        return {"ms": 1e3 * (time.perf_counter() - started)}
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=20, rep=80, quantiles=(0.5, 0.2, 0.8))
    return {"ms": median, "low_ms": low, "high_ms": high}


def compare(setting: Setting, row: Row, ours: Run, exact: Run, peers: Mapping[str, Run], limit: float) -> None:
    """Add to a row: the error of our result, its time, and the time of each peer over ours ("ratio")."""
    row["error"] = distance(ours(), exact())
    row["right"] = row["error"] <= limit  # False for NaN too
    row |= timed(setting, ours)
    row["peers"] = {name: _peer(setting, call, row["ms"]) for name, call in peers.items()}


def _peer(setting: Setting, call: Run, ours: float) -> Row:
    try:
        row = timed(setting, call)
    except Exception as error:  # a peer that does not run here is a result
        return {"missing": reason_of(error)}
    return row | {"ratio": round(row["ms"] / ours, 3)}


def fastest_ratio(row: Row) -> float | None:
    """Time of the fastest peer over ours."""
    return min((peer["ratio"] for peer in row.get("peers", {}).values() if "ratio" in peer), default=None)


def publish(record: Record, setting: Setting, kernel: str, prefixes: tuple[str, ...]) -> None:
    """Write a kernel's row of tiles.json: whether it is right, and its time over torch's, the largest of its rows.

    Args:
        record: Has the rows.
        setting: Says whether this is the rehearsal, which writes nothing.
        kernel: As tiles.json names it.
        prefixes: Starts of the rows' names.
    """
    with record.row(f"tiles.json: {kernel}") as row:
        if setting.small:
            raise MissingError("the rehearsal writes no measurement")
        from vlmbuild.ops import tiles

        rows = [other for other in record.rows if other["name"].startswith(prefixes)]
        torchs = [
            peer["ratio"]
            for other in rows
            for name, peer in other.get("peers", {}).items()
            if "ratio" in peer and name != "Liger"
        ]
        if not torchs:
            raise MissingError("no peer ran")
        major, minor = torch.cuda.get_device_capability()
        row["slower_than_torch"] = 1 / min(torchs)
        row["correct"] = all(other.get("right") is True for other in rows)
        device = torch.cuda.get_device_name()
        entry = {"device": device, "right": row["correct"], "ratio": round(row["slower_than_torch"], 3)}
        write_measurement(tiles.FILE, kernel, 10 * major + minor, entry)
        tiles.tables.cache_clear()


def write_measurement(file: Path, kernel: str, capability: int, entry: Mapping[str, Any]) -> None:
    """Put a kernel's row into tiles.json, which has one line a kernel; see `vlmbuild.ops.tiles`."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["measured"].setdefault(f"sm_{capability}", {})[kernel] = entry
    tables = []
    for table, chips in content.items():
        blocks = []
        for chip, kernels in chips.items():
            lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
            blocks.append(f"    {json.dumps(chip)}: {{\n{lines}\n    }}")
        tables.append(f"  {json.dumps(table)}: {{" + ("\n" + ",\n".join(blocks) + "\n  }" if blocks else "}"))
    file.write_text("{\n" + ",\n".join(tables) + "\n}\n", encoding="utf-8")


def distance(actual: Any, exact: Any) -> float:
    """Largest relative norm of the difference over pairs of tensors; NaN if a result holds one."""
    pairs = list(zip(_tensors(actual), _tensors(exact), strict=True))
    norms = [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in pairs]
    return max(norms, key=lambda norm: float("inf") if norm != norm else norm)


def _tensors(result: Any) -> list[Tensor]:
    items: Iterable[Any] = result if isinstance(result, list | tuple) else [result]
    return [item.detach() for item in items if item is not None]
