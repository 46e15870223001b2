"""Images by address: what is downloaded is limited in bytes, and in pixels before they are decoded."""

from __future__ import annotations

import base64
import io
import itertools
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vlmbuild.families.images import ImageError, image_size, open_image
from vlmbuild.util.pixels import VARIABLE


def encoded(size, mode="RGB", form="PNG"):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, form)
    return stream.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {
            "/good.png": lambda: itertools.repeat(encoded((8, 4)), 1),
            "/bomb.png": lambda: itertools.repeat(encoded((12000, 12000), "1"), 1),
            "/endless": lambda: itertools.repeat(bytes(2**16)),
        }
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/good.png")
            self.end_headers()
            return
        self.send_response(200 if self.path in answers else 404)
        self.end_headers()
        try:
            for part in answers.get(self.path, tuple)():
                self.wfile.write(part)
        except OSError:  # the client has read enough
            pass

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_an_image_is_downloaded(server):
    for name in ("good.png", "moved"):
        assert open_image(f"{server}/{name}", "here").size == (8, 4)
        assert image_size(f"{server}/{name}", "here") == (4, 8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bomb.png", f"12000 x 12000 pixels.*{VARIABLE}"),
        ("endless", rf"more than 4,000,000 bytes.*{VARIABLE}"),
        ("missing", "404"),
    ],
)
def test_what_is_not_read(server, name, said, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1000000")
    for read in (open_image, image_size):
        with pytest.raises(ImageError, match=rf"Sample 3.*{said}"):
            read(f"{server}/{name}", "Sample 3")


def test_text_that_is_an_image_or_nothing(monkeypatch):
    assert open_image(base64.b64encode(encoded((8, 4))).decode(), "here").size == (8, 4)
    with pytest.raises(ImageError, match="there is no such file"):
        open_image("gone.png", "here")
    monkeypatch.setenv(VARIABLE, "100")
    with pytest.raises(ImageError, match="20 x 20 pixels"):
        open_image(base64.b64encode(encoded((20, 20))).decode(), "here")
