"""Run the parts one after another, each in a process with a time limit; see tests/gpu/measure.sh."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.gpu.measure.record import PACKAGES, Record, Setting, fastest_ratio, reason_of, version

PARTS: dict[str, tuple[str, int]] = {
    "kernels": ("checks", 125),
    "attention": ("attention", 85),
    "rotary_loss": ("rotary_loss", 40),
    "lora_step": ("lora_step", 130),
    "linear": ("linear", 35),
    "memory": ("memory", 40),
    "decode": ("decode", 50),
    "families": ("families", 55),
}
"""Name -> module, and the most seconds that it may take; together under 570.

The models come after the kernels: they use the ones that tiles.json then calls right and fast."""
_IMPORTS = (
    "torch._inductor.config",
    "torch._dynamo",
    "triton",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "vlmbuild.builder.build",
    "vlmbuild.train.lora",
)
"""Imported once, before the processes of the parts are forked."""


def main(arguments: list[str]) -> int:
    if arguments[0] == "--compile":
        from tests.gpu.measure.compile import compile_kernels

        return compile_kernels(Path(arguments[1]))
    small = arguments[0] == "--rehearse"
    out, *names = arguments[1:] if small else arguments
    if unknown := set(names) - set(PARTS):
        raise SystemExit(f"No part is called {', '.join(sorted(unknown))}. Choose from {', '.join(PARTS)}.")
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    if small:  # compiled kernels of earlier runs must not matter
        os.environ["TRITON_CACHE_DIR"] = str(directory / "triton")
    for module in _IMPORTS:
        with suppress(Exception):  # the parts that need it report it
            importlib.import_module(module)
    if small:
        with suppress(Exception):
            _share_trace()
    method, device = _device(small)
    setting = Setting("cpu", torch.float16, True) if small else Setting("cuda", torch.bfloat16, False)
    about = {
        "rehearsal": small,
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
    }
    for name in names or PARTS:
        run_part(name, method, setting, directory, about)
        _summarize(directory)
    if not small:
        with suppress(OSError):
            from vlmbuild.ops import tiles

            shutil.copy(tiles.FILE, directory)
    statuses = [json.loads((directory / f"{name}.json").read_text())["status"] for name in names or PARTS]
    return int(any(status in ("failed", "timeout") for status in statuses))


def _share_trace() -> None:
    """Trace the rehearsal's model here, once for all parts."""
    import traces

    from tests.gpu.measure import qwen
    from vlmbuild.families import FAMILIES

    for module in traces.PLACES:
        importlib.import_module(module).trace_program = traces.traced  # type: ignore[attr-defined]
    traces.traced(FAMILIES["qwen2_vl"], qwen.make_config(Setting("cpu", torch.float16, True), "7b"))


def _device(small: bool) -> tuple[str, str]:
    """Return how to start processes, and the GPU's name. Looking at the GPU here would keep forked processes from using it."""
    if small:
        return "fork", "none: a rehearsal on the CPU"
    for method in ("fork", "spawn"):
        context: Any = multiprocessing.get_context(method)
        answers = context.SimpleQueue()
        process = context.Process(target=_ask_device, args=(answers,))
        process.start()
        process.join(60)
        if process.exitcode == 0 and (name := answers.get()):
            return method, name
    raise SystemExit("torch finds no GPU here. Run measure.sh --rehearse OUT for a rehearsal on the CPU.")


def _ask_device(answers: Any) -> None:
    try:
        major, minor = torch.cuda.get_device_capability()
        answers.put(f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}")
    except Exception:
        answers.put("")


def run_part(name: str, method: str, setting: Setting, out: Path, about: dict[str, Any]) -> None:
    """Run a part to its end or its limit. Whatever happens, its JSON is there and says so."""
    seconds = PARTS[name][1] * (4 if setting.small else 1)  # a rehearsal shares the machine
    record = Record(name, out, about)
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=_run_child, args=(name, setting, out, about))
    process.start()
    process.join(seconds)
    if process.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        _close(record, "timeout", f"stopped after {seconds} s; the rows so far are complete")
    elif process.exitcode:
        _close(record, "failed", f"ended with exit code {process.exitcode}; see log/{name}.txt")
    content = json.loads(record.file.read_text())
    print(f"{name:12} {content['status']:8} {content['seconds']:6.1f} s  {content.get('reason', '')}", flush=True)


def _run_child(name: str, setting: Setting, out: Path, about: dict[str, Any]) -> None:
    os.setsid()  # so that the limit ends what it started, too
    (out / "log").mkdir(exist_ok=True)
    with (out / "log" / f"{name}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    record = Record(name, out, about)
    try:
        importlib.import_module(f"tests.gpu.measure.{PARTS[name][0]}").run(record, setting)
    except Exception as error:
        with record.row("part"):
            raise error
    record.close()


def _close(record: Record, status: str, reason: str) -> None:
    """Set the status of a part whose process did not; its rows stay."""
    record.content["rows"] = json.loads(record.file.read_text())["rows"]
    record.content |= {"status": status, "reason": reason}
    record.write()


def _summarize(out: Path) -> None:
    """Write summary.md from all parts' files."""
    found = [json.loads(file.read_text()) for file in (out / f"{name}.json" for name in PARTS) if file.exists()]
    lines = [f"# {found[0]['device']}, {found[0]['date']}", "", str(found[0]["versions"]), ""]
    for content in found:
        lines += [f"## {content['part']}: {content['status']} ({content['seconds']} s) {content.get('reason', '')}", ""]
        lines += ["| row | result | fastest peer / ours |", "|---|---|---|"]
        lines += [f"| {row['name']} | {_result(row)} | {fastest_ratio(row) or ''} |" for row in content["rows"]] + [""]
    (out / "summary.md").write_text("\n".join(lines))


def _result(row: dict[str, Any]) -> str:
    for key in ("failed", "skipped"):
        if key in row:
            return f"{key}: {row[key]}"
    facts = {
        key: row[key] for key in ("ms", "error", "right", "tokens_per_second", "planned", "measured") if key in row
    }
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ModuleNotFoundError, OSError) as problem:
        sys.exit(f"measure: {reason_of(problem)}")
