"""The command `vlmbuild verify`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmbuild.artifact.hub import artifact_directory
from vlmbuild.artifact.reader import ArtifactReader, verify
from vlmbuild.artifact.signature import check_signature
from vlmbuild.cli.options import id_option, json_option, revision_option, trust_option
from vlmbuild.cli.output import StageProgress, show
from vlmbuild.errors import EngineDiffersError, UsageError
from vlmbuild.report.engine import engine_report
from vlmbuild.report.tables import verify_report

if TYPE_CHECKING:
    from vlmbuild.artifact.manifest import Manifest


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@id_option
@revision_option
@click.option(
    "--public-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="KEY",
    help="Fail unless model.sig is a signature of the artifact by the owner of this key; see `vlmbuild sign`.",
)
@click.option(
    "--allow-hardlinks", is_flag=True, help="Accept files with hard links, through which others may change them."
)
@click.option(
    "--numerics", is_flag=True, help="Also run exported models (onnx, aoti), and compare them with the program."
)
@trust_option
@click.option(
    "--engine",
    metavar="NAME",
    help="Also run this engine on the golden cases, and compare every stage that it shows: transformers, onnxruntime, "
    "openvino, transformers.js, vllm or llama.cpp.",
)
@click.option(
    "--engine-python",
    metavar="PATH",
    help="Interpreter that has the engine.  [default: this one; node for transformers.js]",
)
@click.option(
    "--engine-model",
    type=click.Path(exists=True, path_type=Path),
    metavar="DIR",
    help="Folder that the engine opens, if it serves another one, such as a conversion of the artifact.",
)
@click.option(
    "--golden",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.jsonl",
    help='Prompts in place of the artifact\'s golden cases, one per line: {"messages": [...]}.',
)
@json_option
def command(
    artifact: Path,
    expected_id: str | None,
    revision: str | None,
    public_key: Path | None,
    allow_hardlinks: bool,
    numerics: bool,
    trust_code: bool,
    engine: str | None,
    engine_python: str | None,
    engine_model: Path | None,
    golden: Path | None,
    as_json: bool,
) -> None:
    """Check every file of an artifact.

    ARTIFACT is a folder, or the hub id of an artifact, which is downloaded into the hub's cache.

    Compares all files with the manifest. Names every changed, missing, extra or swapped file, and exits with 3. With
    --engine, also compares what an engine computes, stage by stage, names the first stage that differs, and exits with 7.

    \b
    Examples:
        vlmbuild verify qwen2-vl-nf4
        vlmbuild verify qwen2-vl-onnx --numerics
        vlmbuild verify qwen2-vl-onnx --engine onnxruntime
        vlmbuild verify my-w4a16 --engine vllm --engine-python ~/vllm/bin/python
        vlmbuild verify owner/qwen2-vl-nf4 --revision v1
        vlmbuild verify qwen2-vl-nf4 --public-key key.pub
    """
    if engine is None and (engine_python or engine_model or golden):
        raise UsageError("--engine-python, --engine-model and --golden are about an engine. Name it with --engine.")
    with StageProgress(lines=False) as progress:
        directory = artifact_directory(artifact, revision, progress)
        if public_key is not None:  # it signs the manifest, with which the files are compared
            signed = ArtifactReader(directory, verify=False, expected_id=expected_id).manifest
            check_signature(directory, public_key, signed)
            expected_id = signed.id
        manifest = verify(
            directory,
            expected_id=expected_id,
            allow_hardlinks=allow_hardlinks,
            progress=functools.partial(progress, "verify"),
        )
        records = _numerics(directory, manifest, progress, trusted=trust_code) if numerics else []
        compared = {}
        if engine is not None:
            from vlmbuild.engines.verify import verify_engine
            from vlmbuild.golden.cases import read_cases

            cases = read_cases(golden) if golden else ()
            compared["engine"] = verify_engine(
                directory, manifest, engine, python=engine_python, model=engine_model, cases=cases, progress=progress
            )
    document = {
        "path": str(directory),
        "id": manifest.id,
        "name": manifest.name,
        "public_key": None if public_key is None else str(public_key),
        "files": len(manifest.files),
        "bytes": manifest.total_bytes,
        "numerics": records,
        **compared,
    }
    show(document, engine_report if compared else verify_report, as_json=as_json)
    if compared and (first := compared["engine"]["first"]):
        raise EngineDiffersError(
            f"{engine} differs from the program of {artifact} at the stage {first['stage']}: case {first['case']!r}, error "
            f"{first['error']}, and at most {first['tolerance']} is allowed{first['note'] and ': ' + first['note']}. "
            + (
                f"It is known that {known}. Resize images as the processor does before the engine gets them."
                if (known := compared["engine"]["known"])
                else "Repair what computes this stage; later ones follow from it."
            )
        )


def _numerics(artifact: Path, manifest: Manifest, progress: StageProgress, *, trusted: bool) -> list[dict[str, Any]]:
    from vlmbuild.runtime.load import check_trust
    from vlmbuild.targets import target_named

    measurement = target_named(manifest.target).measurement
    if measurement is None:
        raise UsageError(
            f"--numerics compares exported models, and {artifact} has the target {manifest.target}. Drop --numerics."
        )
    check_trust(artifact, manifest, ("code",) if trusted else ())
    with measurement(artifact, str(manifest.recipe["dtype"])) as running:
        return running.records(progress)
