"""Tests of the files that clients without Python read."""

import pytest

from vlmbuild.families.js import image_settings

SETTINGS = {"do_resize": False, "do_rescale": False, "do_normalize": False, "resample": 2}


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config.json": SETTINGS},
        {"processor_config.json": {"image_processor": SETTINGS}},
        {"processor_config.json": {"image_processor": {"do_resize": True}}, "preprocessor_config.json": SETTINGS},
    ],
    ids=["older", "newer", "both"],
)
def test_settings_of_a_processor_are_kept(files):
    assert image_settings(files, "P", "I").items() >= SETTINGS.items()


def test_missing_settings_get_the_defaults_of_transformers():
    files = {"preprocessor_config.json": {"do_resize": None, "size": {"height": 8, "width": 8}}}
    assert image_settings(files, "P", "I", resample=1) == {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 1,
        "size": {"height": 8, "width": 8},
        "processor_class": "P",
        "image_processor_type": "I",
    }
