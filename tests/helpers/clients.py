"""Clients without Python, on artifacts: transformers.js in Node and in a headless browser.

Installing it (470 MB) takes seconds; the reason is given where npm, its registry or a browser is out of reach.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CLIENT = "@huggingface/transformers@4.3.1"
SCRIPTS = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
Answers = list[dict[str, Any]]


class UnavailableError(Exception):
    """A client, or something that it needs, is not installed."""


def install(folder: Path) -> None:
    """Install transformers.js and our scripts for it into a folder."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise UnavailableError("npm is not installed")
    quiet = ("--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1", "--fetch-timeout=20000")
    done = subprocess.run([npm, "install", *quiet, CLIENT], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"npm cannot install {CLIENT}: {' '.join(done.stderr.split())[:300]}")
    for script in SCRIPTS.glob("onnx_client*"):
        shutil.copy(script, folder)


def ask_node(folder: Path, directory: Path, **request: Any) -> Answers:
    """Ask an artifact questions in Node."""
    (folder / "request.json").write_text(json.dumps({"directory": directory, **request}, default=str))
    command = ["node", "onnx_client_node.mjs", "request.json"]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr[-2000:]
    found: Answers = json.loads(answer.stdout.splitlines()[-1])
    return found


def ask_browser(folder: Path, directory: Path, images: Sequence[Path], **request: Any) -> Answers:
    """Ask an artifact questions in a headless browser, which reads everything from a server of this process."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UnavailableError(f"no browser is installed ({', '.join(BROWSERS)})")
    asked = {"name": directory.name, "images": [f"/images/{number}.png" for number in range(len(images))], **request}
    files = {f"/images/{number}.png": image for number, image in enumerate(images)}
    answers: queue.Queue[Any] = queue.Queue()
    handler = functools.partial(_Handler, folder, directory, files, json.dumps(asked).encode(), answers)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/onnx_client.html"
        # Without a sandbox of its own: tests may run as root, and read this page alone.
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        )
        process = subprocess.Popen(
            [browser, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            answer = answers.get(timeout=180)
        finally:
            os.killpg(process.pid, 9)
            process.wait()
            server.shutdown()
    assert "error" not in answer, answer["error"]
    found: Answers = answer["answers"]
    return found


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves the scripts, an artifact under /models/, images and the request; takes the answer."""

    def __init__(
        self,
        folder: Path,
        directory: Path,
        files: Mapping[str, Path],
        request: bytes,
        answers: queue.Queue[Any],
        *args: Any,
    ) -> None:
        self.find: Callable[[str], Path] = lambda path: (
            files[path]
            if path in files
            else directory.parent / path.removeprefix("/models/")
            if path.startswith(f"/models/{directory.name}/")
            else folder / path.lstrip("/")
        )
        self.asked, self.answers = request, answers
        super().__init__(*args)

    def do_GET(self) -> None:
        """Send a file with the type that modules and WebAssembly need."""
        path = self.path.partition("?")[0]
        content = self.asked if path == "/request.json" else None
        if content is None:
            file = self.find(path)
            if not file.is_file():
                self.send_error(404)
                return
            content = file.read_bytes()
        kinds = {".mjs": "text/javascript", ".js": "text/javascript", ".html": "text/html", ".wasm": "application/wasm"}
        self.send_response(200)
        self.send_header("Content-Type", kinds.get(Path(path).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        """Take the answer."""
        self.answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""
