"""The parity matrix at real image sizes: `python tests/bench/parity.py [--output artifacts/benchmarks/parity.json]`.

Prints, for every family and kind of batch, relative errors: logits, loss and the worst gradient in float32 against transformers
in float64 on the same weights; scalar gates relative to the terms that their gradient sums; and logits of an NF4 artifact
against transformers with the same packed weights. Image sizes, tiles and tokenizers are the published ones; widths, depths and
the part of the vocabulary that occurs are tiny.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import matrix
from checkpoints import dequantized
from parity import MODEL_FP32, SAME_WEIGHTS_FP32, relative

from vlmbuild import load
from vlmbuild.builder.build import build
from vlmbuild.recipe import QuantSpec, Recipe

COLUMNS = ("logits", "loss", "gradient", "gate", "nf4 logits")


def measure(name: str) -> list[dict[str, Any]]:
    """Measure one row per batch."""
    setup = matrix.shrink(matrix.SETUPS[name](True))
    theirs = matrix.reference(setup)
    ours = matrix.bind(setup, matrix.program(setup), theirs)
    batches = {case: matrix.batch(setup, *said) for case, said in matrix.conversations(setup).items()}
    rows = []
    for case, (inputs, labels) in batches.items():
        found = matrix.errors(ours, theirs, inputs, labels)
        rows.append({"family": name, "batch": case, "tokens": int(inputs["attention_mask"].sum()), **found})
        print(line(rows[-1]), flush=True)
    del ours
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, artifact = Path(directory) / "checkpoint", Path(directory) / "nf4"
        theirs.save_pretrained(checkpoint)
        setup.processor.save_pretrained(checkpoint)
        build(checkpoint, artifact, Recipe(quantize=QuantSpec(), dtype="float32"))
        model, _ = load(artifact)
        same = dequantized(AutoModelForImageTextToText.from_pretrained(artifact, dtype=torch.float32)).eval()
        for row, (inputs, _) in zip(rows, batches.values(), strict=True):
            attended = inputs["attention_mask"].bool()
            with torch.no_grad():
                row["nf4 logits"] = relative(model(**inputs).logits[attended], same(**inputs).logits[attended])
    return rows


def line(row: dict[str, Any]) -> str:
    figures = "  ".join(f"{row[column]:10.1e}" if column in row else f"{'':10}" for column in COLUMNS)
    return f"{row['family']:10} {row['batch']:22} {row['tokens']:6}  {figures}  {row['parameter']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--family", choices=matrix.SETUPS, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'family':10} {'batch':22} {'tokens':>6}  {'  '.join(f'{name:>10}' for name in COLUMNS)}  worst gradient")
    rows = [row for name in arguments.family or matrix.SETUPS for row in measure(name)]
    print("\nWith NF4:", *(line(row) for row in rows), sep="\n")
    worst = {column: max(row[column] for row in rows) for column in COLUMNS}
    print("\nworst:", {column: f"{value:.1e}" for column, value in worst.items()})
    record = {
        "command": "python tests/bench/parity.py --output artifacts/benchmarks/parity.json",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "limits": {"float32": MODEL_FP32, "nf4 logits": SAME_WEIGHTS_FP32},
        "worst": worst,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
