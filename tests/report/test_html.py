"""The page about an artifact: complete, self-contained, usable by keyboard; rendered by a browser if there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from vlmbuild.cli import main
from vlmbuild.report.contents import contents

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VOID = {"meta", "br", "wbr"}


class Outline(HTMLParser):
    """Open tags, headings, ids, links and focusable elements; an unbalanced tag is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.ids, self.links, self.focusable, self.tags = [], [], [], [], 0, set()
        self.text = ""
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

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and re.fullmatch(r"h[1-6]", self.open[-1]):
            self.headings.append(data)


@pytest.fixture(scope="module")
def html(nf4, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["inspect", str(nf4.path), "--html", str(file)]) == 0
    return file.read_text()


def test_a_page_that_cannot_be_written(run, nf4, tmp_path):
    code, _, err = run("inspect", nf4.path, "--html", tmp_path)
    assert code == 1 and f"{tmp_path} cannot be written" in err and "Traceback" not in err


@pytest.fixture(scope="module")
def outline(html):
    return Outline(html)


def test_every_section_and_region_is_there(outline, nf4):
    assert {"Model", "Passes", "Quantization", "Parity", "Recipe", "Files"} <= set(outline.headings)
    document = contents(nf4.path)
    for region in document["regions"]:
        assert region["name"] in outline.text
    for record in document["passes"]:
        assert f"{record['name']}: {record['matches']:,} rewritten" in outline.text
    assert "Its unquantized graphs are equal to those in the artifact" in outline.text
    assert "model.language_model.layers.*.mlp.down_proj0–2nf4" in outline.text  # one row for layers with one decision
    assert "language_model.layers × 3" in outline.text
    assert re.search(r"4\.\d bits", outline.text)


def test_listings_mark_removed_and_added_lines(html):
    removed = re.sub("<wbr>", "", " ".join(re.findall(r"<del>(.*?)</del>", html)))
    added = re.sub("<wbr>", "", " ".join(re.findall(r"<ins>(.*?)</ins>", html)))
    assert "aten.linear.default" in removed and "vlmbuild.linear_4bit.default" not in removed
    assert "vlmbuild.linear_4bit.default" in added


def test_nothing_is_fetched_and_nothing_runs(html, outline):
    assert not re.search(r"https?://|@import|url\(|<script|javascript:| on\w+=", html)
    assert not outline.tags & {"script", "link", "img", "iframe", "svg"}


def test_the_keyboard_reaches_everything(outline):
    assert all(link.startswith("#") and link[1:] in outline.ids for link in outline.links)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.focusable > 10  # every link, fold and listing


def test_words_break_between_words_only(html):
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"break-all|anywhere|break-word", style)
    assert "color-scheme: light dark" in style and "prefers-color-scheme: dark" in style and "max-width: 760px" in style


@pytest.mark.parametrize("width", [500, 1400])
@pytest.mark.parametrize(("scheme", "flag"), [("light", 1), ("dark", 0)])
def test_a_browser_renders_it(html, tmp_path, scheme, flag, width):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    file, picture = tmp_path / "page.html", tmp_path / f"{scheme}.png"
    file.write_text(html.replace("<details>", "<details open>"))
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},4000",
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
        assert sum(1 for count in pixels.histogram() if count > 50) > 20  # text and boxes, not an empty page
