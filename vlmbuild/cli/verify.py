"""The command `vlmbuild verify`: an artifact's files, and what was exported beside its program."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmbuild.cli.options import json_option, trust_option
from vlmbuild.cli.output import StageProgress
from vlmbuild.errors import UsageError

if TYPE_CHECKING:
    from vlmbuild.artifact.manifest import Manifest


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--id", "expected_id", metavar="sha256:…", help="Fail unless it is this very artifact.")
@click.option("--numerics", is_flag=True, help="Also run what was exported beside its program again.")
@trust_option
@json_option
def verify(artifact: Path, expected_id: str | None, numerics: bool, trust_code: bool, as_json: bool) -> None:
    """Check every file of an artifact.

    All files must be as the manifest says, and there must be no other. Names all files that are changed, missing, extra
    or swapped, and exits with 3.

    \b
    Examples:
        vlmbuild verify qwen2-vl-nf4
        vlmbuild verify qwen2-vl-onnx --numerics
    """
    from vlmbuild.artifact.reader import verify as run_verify
    from vlmbuild.report.tables import verify_report

    if expected_id is not None and not re.fullmatch(r"sha256:[0-9a-f]{64}", expected_id):
        raise UsageError(
            f"--id {expected_id!r} is not sha256: and 64 hexadecimal digits. `vlmbuild inspect` shows one."
        )
    with StageProgress(lines=False) as progress:
        manifest = run_verify(artifact, expected_id=expected_id, progress=functools.partial(progress, "verify"))
        records = _numerics(artifact, manifest, progress, trusted=trust_code) if numerics else []
    document = {
        "path": str(artifact),
        "id": manifest.id,
        "name": manifest.name,
        "files": len(manifest.files) + 2,
        "bytes": manifest.total_bytes,
        "numerics": records,
    }
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(verify_report(document)))


def _numerics(artifact: Path, manifest: Manifest, progress: StageProgress, *, trusted: bool) -> list[dict[str, Any]]:
    from vlmbuild.measure.aoti_parity import code_measurement
    from vlmbuild.measure.onnx_parity import onnx_measurement
    from vlmbuild.runtime.load import check_trust

    dtype = str(manifest.recipe["dtype"])
    if manifest.target == "onnx":
        with onnx_measurement(artifact, dtype) as measurement:
            return measurement.records(progress)
    if manifest.target == "aoti":
        check_trust(artifact, manifest, ("code",) if trusted else ())
        with code_measurement(artifact, dtype) as measurement:
            return measurement.records(progress)
    raise UsageError(
        f"--numerics is for exported artifacts, and {artifact} has the target {manifest.target}. Leave it out."
    )
