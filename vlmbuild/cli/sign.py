"""The command `vlmbuild sign`."""

from __future__ import annotations

from pathlib import Path

import click

from vlmbuild.artifact.signature import SIGNATURE, sign
from vlmbuild.cli.options import json_option
from vlmbuild.cli.output import StageProgress, show
from vlmbuild.report.tables import sign_report


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--private-key",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="KEY",
    help="Elliptic-curve key in PEM.",
)
@json_option
def command(artifact: Path, private_key: Path, as_json: bool) -> None:
    """Sign an artifact, so that others can check who made it.

    Verifies every file and writes the signature, model.sig, into the folder of ARTIFACT, over an earlier one. Its id
    stays. Needs OpenSSF model signing: pip install 'vlmbuild[sign]'.

    \b
    Examples:
        openssl ecparam -genkey -name prime256v1 -noout -out key.pem
        openssl ec -in key.pem -pubout -out key.pub
        vlmbuild sign qwen2-vl-nf4 --private-key key.pem
        vlmbuild verify qwen2-vl-nf4 --public-key key.pub
    """
    with StageProgress(lines=False):
        manifest = sign(artifact, private_key)
    document = {"path": str(artifact), "id": manifest.id, "signature": str(artifact / SIGNATURE)}
    show(document, sign_report, as_json=as_json)
