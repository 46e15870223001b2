"""The command line: options, one error boundary, and nothing that works; `vlmbuild --help` does not import torch."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmbuild.cli.graphs import inspect
from vlmbuild.cli.locks import COMMANDS
from vlmbuild.cli.options import build_options, json_option, limit_options, recipe_options, workload_options
from vlmbuild.cli.output import StageProgress, quiet_libraries
from vlmbuild.cli.run import run
from vlmbuild.cli.verify import verify
from vlmbuild.errors import GraphDiffersError, UsageError, VlmbuildError
from vlmbuild.recipe import Recipe

if TYPE_CHECKING:
    from vlmbuild.planner.memory import Workload

INTERRUPTED, TERMINATED = 130, 143
_TRACEBACK = "VLMBUILD_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Every error ends here, as one paragraph on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    with _terminable():
        try:
            cli.main(arguments, prog_name="vlmbuild", standalone_mode=False)
        except GraphDiffersError as error:  # its command has printed the differences, which are the JSON document
            _say(f"error: {error}", err=True)
            return error.exit_code
        except VlmbuildError as error:
            return _fail(arguments, type(error).__name__, str(error), error.exit_code)
        except click.UsageError as error:
            if not arguments:  # the message is the help
                click.echo(error.format_message(), err=True)
                return UsageError.exit_code
            hint = f" Try `{error.ctx.command_path} --help`." if error.ctx else ""
            return _fail(arguments, "UsageError", error.format_message() + hint, UsageError.exit_code)
        except click.ClickException as error:
            return _fail(arguments, type(error).__name__, error.format_message(), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            return _fail(arguments, "Interrupted", "interrupted; nothing was left half-written.", INTERRUPTED)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        except Exception as error:
            return _fail(arguments, type(error).__name__, _unexpected(error), 1)
    return 0


def _fail(arguments: Sequence[str], kind: str, message: str, code: int) -> int:
    if "--json" in arguments:
        _say(_json({"error": {"type": kind, "message": message, "exit_code": code}}))
    _say(f"error: {message}", err=True)
    return code


def _say(text: str, *, err: bool = False) -> None:
    """Print, also when nobody reads any more: the exit code must still be the error's. (click sees to all other output.)"""
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        stream = sys.stderr if err else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # where the interpreter flushes at exit


def _unexpected(error: Exception) -> str:
    if os.environ.get(_TRACEBACK):
        traceback.print_exception(error)
    return (
        f"unexpected {type(error).__name__}: {error}. This is a defect of vlmbuild, or of a library under it; run the "
        f"command again with {_TRACEBACK}=1 to see where, and report it."
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that what is half-written is removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the removal short
        raise SystemExit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, default=str)


def _show(document: Mapping[str, Any], as_json: bool, report: str) -> None:
    """Print a command's document, or the table that `vlmbuild.report.tables` makes of it."""
    from vlmbuild.report import tables as reports

    click.echo(_json(document) if as_json else "\n".join(getattr(reports, report)(document)))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(importlib.metadata.version("vlmbuild"), package_name="vlmbuild", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile vision-language models into trainable, verified artifacts.

    \b
    Try it offline, on a CPU, in minutes:
        vlmbuild demo

    \b
    On a model of yours:
        vlmbuild plan   Qwen/Qwen2-VL-2B-Instruct --quantize nf4
        vlmbuild build  Qwen/Qwen2-VL-2B-Instruct -o qwen2-vl-nf4 --quantize nf4
        vlmbuild verify qwen2-vl-nf4
        vlmbuild run    qwen2-vl-nf4 --image photo.jpg --prompt "What is in the picture?"

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 integrity, 4 trust, 5 incompatible, 6 the graph differs,
    130 and 143 interrupted.
    """


@cli.command()
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="Folder to make.")
@recipe_options
@build_options
@json_option
def build(
    source: str,
    output: Path,
    recipe: Recipe,
    overwrite: bool,
    revision: str | None,
    device: str,
    calibrate: Path | None,
    adapter: Path | None,
    as_json: bool,
) -> None:
    """Build an artifact from a checkpoint.

    SOURCE is a checkpoint folder, a hub id, or the name of a zoo checkpoint (qwen2-vl-digits, mllama-digits,
    pixtral-digits). OUT appears complete or not at all. It is an ordinary Hugging Face checkpoint with the compiled
    graph beside it.

    \b
    Examples:
        vlmbuild build qwen2-vl-digits -o digits-nf4 --quantize nf4
        vlmbuild build Qwen/Qwen2-VL-2B-Instruct -o qwen2-vl-nf4 --quantize nf4 --require fuse_mrope
        vlmbuild build ./my-checkpoint -o my-model --dtype float32 --overwrite
        vlmbuild build qwen2-vl-nf4 -o qwen2-vl-bf16 --quantize none
        vlmbuild build qwen2-vl-digits -o digits-auto --quantize auto --budget 4.5bpw
        vlmbuild build qwen2-vl-nf4 -o qwen2-vl-merged --adapter my-adapter
    """
    from vlmbuild.builder.build import build as run_build
    from vlmbuild.builder.summary import inspect as run_inspect

    batches = [] if calibrate is None else _calibration(source, revision, recipe, calibrate)
    with StageProgress(lines=not as_json) as progress:
        artifact = run_build(
            source,
            output,
            recipe,
            overwrite=overwrite,
            revision=revision,
            device=device,
            calibration=batches,
            adapter=adapter,
            progress=progress,
        )
    _show(run_inspect(artifact.path), as_json, "build_report")


def _calibration(source: str, revision: str | None, recipe: Recipe, file: Path) -> list[Any]:
    from vlmbuild.builder.build import check_calibration, read_model
    from vlmbuild.checkpoint.source import resolve
    from vlmbuild.measure.calibration import conversation_batches

    check_calibration(recipe, file)
    found = resolve(source, revision=revision, weights=False)
    _, family, _ = read_model(found)
    return list(conversation_batches(file, family.processor(found.directory)))


@cli.command()
@click.argument("source")
@recipe_options
@click.option(
    "--image", "images", multiple=True, metavar="FILE|HxW", help="Say what an image costs, in every sample. Repeatable."
)
@limit_options
@workload_options
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@json_option
def plan(
    source: str,
    recipe: Recipe,
    images: tuple[str, ...],
    limits: Mapping[str, int],
    workload: Workload,
    revision: str | None,
    as_json: bool,
) -> None:
    """Say what a build would do, and the memory that the model needs, without weights.

    config.json of SOURCE is enough: no weights are read or downloaded. Memory is that to load the model, to infer (one
    forward pass) and to train a LoRA adapter with AdamW, with gradient checkpointing and without.

    \b
    Examples:
        vlmbuild plan Qwen/Qwen2-VL-72B-Instruct --quantize nf4 --image 1080x1920 --image photo.jpg
        vlmbuild plan Qwen/Qwen2-VL-7B-Instruct --quantize nf4 --image 448x448 --batch 8 --text-tokens 512
        vlmbuild plan Qwen/Qwen2-VL-7B-Instruct --image 2000x3000 --longest-edge 1003520
    """
    from vlmbuild.planner.plan import plan as run_plan

    with StageProgress(lines=not as_json) as progress:
        planned = run_plan(
            source,
            recipe,
            images=map(_image, images),
            limits=limits,
            workload=workload,
            revision=revision,
            progress=progress,
        )
    _show(planned.to_json(), as_json, "plan_report")


def _image(text: str) -> str | tuple[int, int]:
    size = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    return (int(size[1]), int(size[2])) if size else text


@cli.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for what it makes.  [default: a temporary one]",
)
@click.option(
    "--family",
    type=click.Choice(["qwen2_vl", "mllama", "pixtral"]),
    default="qwen2_vl",
    show_default=True,
    help="Whose tiny checkpoint.",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True, help="Computes in it."
)
@json_option
def demo(output: Path | None, family: str, dtype: str, as_json: bool) -> None:
    """Show everything on a tiny model.

    Plans, builds, verifies, loads and fine-tunes a trained checkpoint that ships with vlmbuild; offline, on a CPU.

    \b
    Examples:
        vlmbuild demo -o digits-demo
        vlmbuild demo --family pixtral
    """
    from vlmbuild.artifact.output import output_errors
    from vlmbuild.demo.run import run as run_demo

    if output is None:
        output = Path(tempfile.mkdtemp(prefix="vlmbuild-demo-"))
    with output_errors(output):
        output.mkdir(exist_ok=True)
    result = run_demo(output, family=family, dtype=dtype, echo=functools.partial(click.echo, err=as_json))
    if as_json:
        click.echo(_json(asdict(result)))


for command in (inspect, run, verify, *COMMANDS):
    cli.add_command(command)
