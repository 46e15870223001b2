"""Files for other viewers: every edge has its nodes, and every region is there."""

from __future__ import annotations

import json
import re

import pytest

from vlmbuild.cli import main
from vlmbuild.report.exchange import to_dot, to_model_explorer


def test_dot_has_a_cluster_a_region_and_no_loose_edge(pristine_built):
    text = to_dot(pristine_built)
    nodes = re.findall(r'^  "(\w+)" \[label=', text, re.MULTILINE)  # at the top level: Netron reads no others
    edges = re.findall(r'^  "(\w+)" -> "(\w+)";', text, re.MULTILINE)
    assert len(nodes) == len(set(nodes))
    assert {end for edge in edges for end in edge} <= set(nodes)
    assert re.findall(r'^    "(\w+)";', text, re.MULTILINE) == nodes
    assert text.count("subgraph cluster_") == len(pristine_built.regions)


def test_labels_name_operators_as_netron_reads_them(pristine_built):
    """Its reader takes the first field as the node's name, the second as its kind, the third as operator and facts."""
    labels = re.findall(r'"(\w+)" \[label="\{(.*)\}"\];', to_dot(pristine_built))
    assert labels
    for name, label in labels:
        fields = label.split("|")
        assert fields[:2] == [name, "op_code=call_function\\l"]
        operator, *facts, end = fields[2].split("\\l")
        assert operator and not end and all(len(fact.split(":")) == 2 for fact in facts)
    assert any("|aten.linear.default\\ltype: " in label for _, label in labels)


def test_model_explorer_nodes_refer_to_each_other(pristine_built):
    document = to_model_explorer(pristine_built)
    assert (document["label"], len(document["graphs"])) == (pristine_built.family, len(pristine_built.regions))
    for graph in document["graphs"]:
        ids = [node["id"] for node in graph["nodes"]]
        assert len(ids) == len(set(ids))
        for node in graph["nodes"]:
            assert {"id", "label", "namespace", "attrs", "incomingEdges"} == set(node)
            assert all(edge["sourceNodeId"] in ids for edge in node["incomingEdges"])
            assert all(isinstance(value, str) for pair in node["attrs"] for value in pair.values())


@pytest.mark.parametrize("style", ["text", "json", "dot", "model-explorer"])
def test_the_command(capsys, nf4, style):
    assert main(["inspect", str(nf4.path), "--format", style]) == 0
    out = capsys.readouterr().out
    assert "language_model.layers" in out
    if style in ("json", "model-explorer"):
        assert json.loads(out)
