"""Recipes: validation, TOML, and a fingerprint over every field."""

from __future__ import annotations

import os
from dataclasses import fields, replace

import pytest

from vlmbuild.artifact.canonical import canonical_json, parse_canonical
from vlmbuild.errors import UsageError
from vlmbuild.quant.spec import ROLES, Override
from vlmbuild.recipe import QuantSpec, Recipe


def test_fingerprint_changes_with_every_field():
    base = Recipe(quantize=QuantSpec())
    other = {
        "target": None,
        "quantize": QuantSpec(blocksize=128),
        "attention": "sdpa",
        "dtype": "float32",
        "require": ("a",),
    }
    assert other.keys() == {field.name for field in fields(Recipe) if field.init}
    changed = {replace(base, **{name: value}).fingerprint() for name, value in other.items() if value is not None}
    specs = [
        QuantSpec("fp4"),
        QuantSpec(double_quant=False),
        QuantSpec(skip=("x",)),
        QuantSpec(roles=("vision",)),
        QuantSpec(overrides=(Override("x", "int8"),)),
        QuantSpec("int8", threshold=5.5),
        QuantSpec("auto", budget=5),
    ]
    changed |= {Recipe(quantize=spec).fingerprint() for spec in specs} | {Recipe().fingerprint()}
    assert len(changed) == 12
    assert base.fingerprint() not in changed
    assert base.fingerprint() == Recipe(quantize=QuantSpec()).fingerprint()


def test_toml_with_overrides(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('dtype = "float32"\nrequire = ["fuse_rope"]\n[quantize]\nformat = "fp4"\nskip = ["*.o_proj"]\n')
    recipe = Recipe.from_toml(file, attention="sdpa")
    assert recipe == Recipe(
        quantize=QuantSpec("fp4", skip=("*.o_proj",)), attention="sdpa", dtype="float32", require=("fuse_rope",)
    )
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe


MIX = """
[quantize]
format = "auto"
budget = "4.5bpw"
roles = ["language", "vision"]
[[quantize.overrides]]
pattern = "*.down_proj"
format = "int8"
threshold = 5.5
"""


def test_every_option_survives_a_manifest(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(MIX)
    recipe = Recipe.from_toml(file)
    override = Override("*.down_proj", "int8", threshold=5.5)
    assert recipe.quantize == QuantSpec("auto", budget=4.5, roles=("language", "vision"), overrides=(override,))
    assert Recipe.from_mapping(parse_canonical(canonical_json(recipe.to_mapping()))) == recipe


@pytest.mark.parametrize(("value", "expected"), [("none", QuantSpec("none")), ("nf4", QuantSpec()), (None, None)])
def test_quantize_by_name(value, expected):
    assert Recipe.from_mapping({"quantize": value}).quantize == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dtype = 'int8'", "dtype cannot be 'int8'. Choose one of: float32"),
        ("speed = 'fast'", "unknown option 'speed'. Known options: attention"),
        ("[quantize]\nbits = 4", "unknown option 'bits' in"),
        ("[quantize]\nformat = 'nf3'", "quantize.format cannot be 'nf3'"),
        ("[quantize]\nblocksize = 100", "quantize.blocksize cannot be 100"),
        ("[quantize]\ndouble_quant = 1", "must be true or false"),
        ("[quantize]\nskip = 'x'", "must be a list of strings"),
        ("[quantize]\nformat = 'auto'", "auto needs one"),
        ("[quantize]\nbudget = 5", "goes with the format auto"),
        ("[quantize]\nformat = 'auto'\nbudget = 3.9", "must be above 4"),
        ("[quantize]\nformat = 'auto'\nbudget = 'five'", "budget must be a number"),
        ("[quantize]\nformat = 'int8'\nthreshold = -1", "must not be negative"),
        ("[quantize]\nformat = 'int8'\nthreshold = nan", "threshold must be a number"),
        (
            "[quantize]\nthreshold = 5",
            "quantize.threshold is not an option of nf4; its options are blocksize, double_quant",
        ),
        ("[quantize]\nformat = 'source'\nblocksize = 128", "quantize.blocksize is not an option of source"),
        ("[quantize]\nroles = ['tower']", "quantize.roles cannot be 'tower'"),
        ("[quantize]\nroles = ['vision=int3']", "format of 'vision' cannot be 'int3'"),
        ("[quantize]\nroles = ['vision', 'vision=int8']", "vision has two formats"),
        ("[quantize]\nroles = ['embedding']", "embedding cannot be built with --target trainable.*--target onnx"),
        ("[quantize]\nroles = ['vision=int4']", "int4 cannot be built with --target trainable.*--target onnx"),
        ("[[quantize.overrides]]\npattern = 'x'", "is not a table with pattern and format"),
        ("[[quantize.overrides]]\npattern = 'x'\nformat = 'auto'", "format of 'x' cannot be 'auto'"),
        ("[quantize]\noverrides = 'x'", "overrides must be a list of tables"),
        (
            "[quantize]\nformat = 'int8'\n[[quantize.overrides]]\npattern = 'x'\nformat = 'int8'\nthreshold = 5",
            "one threshold",
        ),
        ("quantize = 4", "quantize must be a table or one of source, none, nf4"),
        ("require = 'x'", "require must be a list of strings"),
        ("require = [{ a = 1 }]", "require must be a list of strings"),
        ("attention = 'flash'", "attention cannot be 'flash'"),
        ("target = 'mlx'", "target cannot be 'mlx'"),
        ("dtype = ", "is not valid TOML"),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        Recipe.from_toml(file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(quantize="nf4"), "must be a QuantSpec or None"),
        (lambda: Recipe(require="fuse_rope"), "require must be a list of strings"),
        (lambda: QuantSpec(skip="*.o_proj"), "skip must be a list of strings"),
        (lambda: QuantSpec(blocksize=64.0), "quantize.blocksize cannot be 64.0"),
    ],
)
def test_values_made_in_python_are_checked_too(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_pipes_and_huge_files_are_refused_at_once(tmp_path):
    file = tmp_path / "r.toml"
    file.touch()
    os.truncate(file, 6 * 2**30)  # sparse
    with pytest.raises(UsageError, match=r"r.toml.* more than \d+ bytes"):
        Recipe.from_toml(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UsageError, match="r.toml.* not a regular file"):
        Recipe.from_toml(file)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        Recipe.from_toml(tmp_path / "no.toml")


def test_a_format_has_its_own_default_roles():
    int4 = QuantSpec("int4")
    assert QuantSpec().roles == QuantSpec("source").roles == ("language",)
    assert QuantSpec("source").changed(format="int4") == int4
    assert int4.changed(blocksize=128).roles == int4.roles
    assert int4.changed(format="nf4") == QuantSpec()
    assert QuantSpec(roles=("vision",)).changed(format="int4").roles == ("vision",)
    assert {role: getattr(int4.role_format(role), "name", None) for role in ROLES} == {
        **dict.fromkeys(ROLES, "int8"),
        "language": "int4",
    }
    language = QuantSpec("int4", roles=("language",))
    assert [role for role in ROLES if language.role_format(role)] == ["language"]
    assert QuantSpec.from_mapping(int4.to_mapping(), "recipe") == int4
    override = Override("x", "int8", threshold=5.5)  # all 8-bit layers have one threshold
    assert QuantSpec("int4", overrides=(override,)).role_format("vision") == override.choice
