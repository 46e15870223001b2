"""Files for other viewers: every edge has its nodes, and every region is there."""

from __future__ import annotations

import json
import re

import pytest
import tiny

from vlmbuild.cli import main
from vlmbuild.report.drawing import layout
from vlmbuild.report.exchange import to_dot, to_model_explorer
from vlmbuild.report.graph_view import view_nodes


def test_dot_has_a_cluster_a_region_and_no_loose_edge(pristine_built):
    text = to_dot(pristine_built)
    nodes = re.findall(r'^    "(\w+)" \[label=', text, re.MULTILINE)
    edges = re.findall(r'^    "(\w+)" -> "(\w+)";', text, re.MULTILINE)
    assert len(nodes) == len(set(nodes))
    assert {end for edge in edges for end in edge} <= set(nodes)
    assert text.count("subgraph cluster_") == len(pristine_built.regions)
    assert text.count("{") == text.count("}")


def test_model_explorer_nodes_refer_to_each_other(pristine_built):
    document = to_model_explorer(pristine_built)
    assert len(document["graphs"]) == len(pristine_built.regions)
    for graph in document["graphs"]:
        ids = [node["id"] for node in graph["nodes"]]
        assert len(ids) == len(set(ids))
        for node in graph["nodes"]:
            assert {"id", "label", "namespace", "attrs", "incomingEdges"} == set(node)
            assert all(edge["sourceNodeId"] in ids for edge in node["incomingEdges"])
            assert all(isinstance(value, str) for pair in node["attrs"] for value in pair.values())


def test_no_two_nodes_of_a_drawing_overlap(pristine_built):
    for region in pristine_built.regions.values():
        places = layout(view_nodes(region))
        assert len(set(places.values())) == len(places)


def test_inputs_stand_above_what_reads_them():
    nodes = view_nodes(tiny.linear_region())
    places = layout(nodes)
    for node in nodes:
        for source in node.inputs:
            assert places[source][1] < places[node.id][1]


@pytest.mark.parametrize("style", ["text", "json", "dot", "model-explorer"])
def test_the_command(capsys, nf4, style):
    assert main(["inspect", str(nf4.path), "--format", style]) == 0
    out = capsys.readouterr().out
    assert "language_model.layers" in out
    if style in ("json", "model-explorer"):
        assert json.loads(out)


def test_the_page_command(capsys, nf4, tmp_path):
    file = tmp_path / "report.html"
    assert main(["inspect", str(nf4.path), "--html", str(file)]) == 0
    assert file.read_text().startswith("<!DOCTYPE html>")
    assert str(file) in capsys.readouterr().out
    assert main(["inspect", str(nf4.path), "--html", str(tmp_path / "no" / "report.html")]) == 1
    assert "Traceback" not in capsys.readouterr().err
