"""Contents of artifacts are read as data: names and sizes agree with families and headers."""

from __future__ import annotations

import json

import pytest

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.checkpoint.source import resolve
from vlmbuild.errors import IncompatibleError
from vlmbuild.families import family_of
from vlmbuild.report.contents import contents, published_names
from vlmbuild.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_published_names_are_those_of_the_family(name):
    source = resolve(name)
    family = family_of(source.config(), name)
    stored = list(CheckpointWeights(source.directory).tensors)
    modules = [family.module_name(entry) for entry in stored]
    assert published_names(modules, stored) == dict(zip(modules, stored, strict=True))


def test_a_weight_that_is_not_published_is_named():
    with pytest.raises(IncompatibleError, match=r"model\.visual\.b\.weight"):
        published_names(["model.visual.b.weight"], ["visual.a.weight"])


def test_bytes_of_all_roles_are_those_of_the_file(nf4):
    document = contents(nf4.path)
    total = sum(info.nbytes for info in CheckpointWeights(nf4.path).tensors.values())
    assert sum(role["bytes"] for role in document["roles"]) == total
    json.dumps(document)
    language = next(role for role in document["roles"] if role["role"] == "language")
    assert language["quantized"] > 0.9 * language["parameters"]
