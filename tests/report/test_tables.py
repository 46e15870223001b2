"""Reports fit a terminal of 80 columns, whatever the size of the model; words are not broken within."""

from __future__ import annotations

import copy
import re

import pytest

from vlmbuild.cli.output import show
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.report.contents import contents
from vlmbuild.report.tables import build_report, inspect_report, parity_table, verify_report

PARITY = {
    "adapter": {
        "case": "merged",
        "error": "1.234e-03",
        "tolerance": "",
        "formats": ["nf4", "int8"],
        "effect": "1.234e-01",
        "worst_token": "5.678e-03",
        "top1": 1234,
        "tokens": 1235,
    },
    "export": {
        "case": "cached steps, without images",
        "output": "image_features",
        "error": "1.234e-07",
        "tolerance": "1e-04",
        "top1": 1234,
        "tokens": 1235,
        "greedy": 16,
        "generated": 16,
    },
}


@pytest.fixture
def large(nf4):
    """An artifact as large as published ones."""
    document = copy.deepcopy(contents(nf4.path))
    for entry in (*document["roles"], *document["regions"]):
        entry |= {key: value * 100_000 for key, value in entry.items() if key in ("parameters", "bytes", "quantized")}
        entry |= {"formats": {form: count * 100_000 for form, count in entry.get("formats", {}).items()}}
    document["files"] += [
        {"path": f"model-{number:05d}-of-00030.safetensors", "role": "weights", "bytes": 5 << 30}
        for number in range(30)
    ]
    return document


@pytest.mark.parametrize("report", [build_report, inspect_report, verify_report])
@pytest.mark.parametrize("parity", PARITY)
def test_no_line_is_longer_than_80_columns(report, parity, large, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    document = {**large, "path": "artifact", "numerics": [PARITY[parity]]}
    if report is verify_report:
        document["files"] = len(large["files"])
    show(document, report, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = set(re.findall(r"\S+", "\n".join(lines)))
    numbers = [str(value) for value in PARITY[parity].values() if isinstance(value, str) and " " not in value]
    assert not [number for number in numbers if not any(number in word for word in words)]


@pytest.mark.parametrize(("form", "shown"), [("int8", "int8;"), ("nf4", "nf4, blocks of 64;")])
def test_formats_of_onnx_models_are_described_as_stored(form, shown, large, capsys):
    """Without outlier columns or nested scales, which ONNX Runtime has no operator for."""
    recipe = Recipe(target="onnx", quantize=QuantSpec(form)).to_mapping()
    show({**large, "recipe": recipe}, inspect_report, as_json=False)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("quantize "))
    assert line.split(maxsplit=1)[1].startswith(shown)


def test_a_tolerance_is_beside_the_error_that_it_limits():
    record = {**PARITY["adapter"], "tolerance": "2e-03", "formats": []}
    columns = {column.header: list(column.cells) for column in parity_table([record]).columns}
    assert list(columns)[1:4] == ["relative error", "its tolerance", "worst token (no limit)"]
    assert [columns[head] for head in list(columns)[1:4]] == [["1.234e-03"], ["2e-03"], ["5.678e-03"]]


def test_columns_without_a_value_are_left_out(large, capsys):
    show({**large, "numerics": [PARITY["export"]]}, build_report, as_json=False)
    out = capsys.readouterr().out
    assert "16/16" in out and "effect" not in out
