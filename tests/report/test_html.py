"""The page about an artifact: whole, self-contained, usable by keyboard; and rendered by a browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from vlmbuild.report.html import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VOID = {"meta", "rect", "path", "br", "img", "link", "input"}


class Outline(HTMLParser):
    """Open tags, headings, ids, links and what the keyboard reaches; an unbalanced tag is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.ids, self.links, self.focusable, self.tags = [], [], [], [], 0, set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.focusable += values.get("tabindex") == "0" or tag in ("a", "summary")

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and re.fullmatch(r"h[1-6]", self.open[-1]):
            self.headings.append(data)


@pytest.fixture(scope="module")
def text(nf4):
    return page(nf4.path)


@pytest.fixture(scope="module")
def outline(text):
    return Outline(text)


def test_every_section_and_region_is_there(text, outline):
    for heading in ("Pipeline", "Operators and bytes", "Weights and quantization", "Parity", "Regions", "Manifest"):
        assert heading in outline.headings
    for region in ("visual.blocks × 2", "language_model.layers × 3", "language_model.norm"):
        assert region in outline.headings
    for stage in ("captured: ", "after normalize: ", "after fuse_mrope: ", "as stored: "):
        assert f"<summary>{stage}" in text
    assert "its own unquantized graphs are equal to what this vlmbuild compiles" in text
    assert "linear_4bit" in text
    assert "model.language_model.layers.2.mlp.down_proj" in text


def test_nothing_is_fetched_and_nothing_runs(text, outline):
    assert not re.search(r"https?://|@import|url\(|<script|javascript:| on\w+=", text)
    assert not outline.tags & {"script", "link", "img", "iframe"}


def test_the_keyboard_reaches_everything(outline):
    assert all(link.startswith("#") and link[1:] in outline.ids for link in outline.links)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.focusable > 300  # every node of every drawing, every bar, every fold
    assert "svg" in outline.tags


def test_light_and_dark(text):
    assert "color-scheme: light dark" in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(("scheme", "flag"), [("light", 1), ("dark", 0)])
def test_a_browser_renders_it(text, tmp_path, scheme, flag):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    file, picture = tmp_path / "page.html", tmp_path / f"{scheme}.png"
    file.write_text(text.replace("<details>", "<details open>"))
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1240,4000",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={flag}",
        f"--screenshot={picture}",
        file.as_uri(),
    ]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    with Image.open(picture) as image:
        pixels = image.convert("L")
        corner = pixels.getpixel((5, 5))
        assert (corner < 60) if scheme == "dark" else (corner > 230)
        histogram = pixels.histogram()
        assert sum(1 for count in histogram if count > 50) > 20  # text, boxes and bars, not an empty page
