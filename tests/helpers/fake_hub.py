"""A hub on this machine that speaks the real one's HTTP protocol: repositories, LFS uploads in parts, commits, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

TOKEN = "hf_of_the_owner"
PART = 64 * 2**10
"""Bytes of a part of a larger LFS object."""


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Repository:
    """Branches with their commits; a commit is a mapping of paths to (kind, content or LFS digest)."""

    def __init__(self, private):
        self.private = private
        self.commits = {}
        self.branches = {}
        self.messages = {}
        self.commit("main", {".gitattributes": ("regular", b"*.safetensors filter=lfs\n")}, "initial commit")

    def commit(self, branch, tree, message):
        text = repr((sorted(tree.items()), self.branches.get(branch), message))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.messages[commit] = tree, message
        self.branches[branch] = commit
        return commit

    def resolve(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)

    def tree(self, revision):
        return self.commits[self.resolve(revision)]


class FakeHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: Name -> repository.
        objects: SHA-256 -> content of the LFS objects that have arrived.
        requests: (method, path) of every request.
        refuse: (method, path) -> None, or (status, message) of an answer in place of the usual one. May raise
            ConnectionError to hang up.
        largest: Most bytes of an LFS object.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.objects, self.parts, self.requests = {}, {}, {}, []
        self.refuse = lambda method, path: None
        self.largest = 2**40
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A hang-up that a test asks for is none of the log's business."""

    def content(self, entry):
        kind, value = entry
        return self.objects[value] if kind == "lfs" else value

    def files(self, name, revision="main"):
        return {path: self.content(entry) for path, entry in self.repositories[name].tree(revision).items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=None, status=200, headers=(), data=None):
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in dict(headers).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, message, code=None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, status, headers)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self):
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.query = {name: values[0] for name, values in parse_qs(address.query).items()}
        self.server.requests.append((self.command, path))
        data = self.body()
        if refusal := self.server.refuse(self.command, path):
            self.fail(*refusal)
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.signed_in = token == TOKEN
        if token and not self.signed_in:
            self.fail(401, "Invalid credentials in Authorization header")
            return
        for method, pattern, action in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                with self.server.lock:
                    action(self, data, *match.groups())
                return
        self.fail(404, f"no such page: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815  # the base class calls them so

    def repository(self, name, revision=None):
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.signed_in):
            self.fail(404 if self.signed_in else 401, "Repository not found", "RepoNotFound")
            return None
        if revision is not None and found.resolve(revision) is None:
            self.fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return found

    def whoami(self, _):
        if self.signed_in:
            self.answer({"type": "user", "name": "owner", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        else:
            self.fail(401, "Invalid username or password.")

    def create(self, data):
        asked = json.loads(data)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.signed_in or asked["organization"] != "owner":
            self.fail(403, "You don't have the rights to create a model under this namespace")
        elif name in self.server.repositories:
            self.answer({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories[name] = Repository(bool(private))
            self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def info(self, _, name, revision="main"):
        if found := self.repository(name, revision):
            siblings = [{"rfilename": path} for path in found.tree(revision)]
            sha = found.resolve(revision)
            self.answer({"id": name, "modelId": name, "sha": sha, "private": found.private, "siblings": siblings})

    def listing(self, _, name, revision):
        if found := self.repository(name, revision):
            entries = []
            for path, (kind, value) in found.tree(revision).items():
                data = self.server.content((kind, value))
                entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
                entries.append(
                    entry | ({"lfs": {"oid": value, "size": len(data), "pointerSize": 130}} if kind == "lfs" else {})
                )
            self.answer(entries)

    def branch(self, data, name, branch):
        if found := self.repository(name):
            if branch in found.branches:
                self.fail(409, f"Reference {branch} already exists")
                return
            found.branches[branch] = found.branches[json.loads(data or b"{}").get("startingPoint", "main")]
            self.answer({})

    def preupload(self, data, name, revision):
        if found := self.repository(name, revision):
            asked, tree = json.loads(data), found.tree(revision)
            ignored = asked.get("gitIgnore", self.server.content(tree.get(".gitignore", ("regular", b""))).decode())
            files = []
            for file in asked["files"]:
                lfs = file["path"].endswith((".safetensors", "tokenizer.json")) or file["size"] > 10 * 2**20
                kind, value = tree.get(file["path"], (None, None))
                oid = value if kind == "lfs" else git_hash(value) if kind else None
                mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": file["path"] in ignored.split()}
                files.append({"path": file["path"], "oid": oid, **mode})
            self.answer({"files": files})

    def batch(self, data, name):
        if not self.repository(name):
            return
        objects = []
        for item in json.loads(data)["objects"]:
            oid, size = item["oid"], item["size"]
            if size > self.server.largest:
                objects.append(item | {"error": {"code": 422, "message": f"larger than {self.server.largest} bytes"}})
            elif oid in self.server.objects:
                objects.append(item)
            else:
                objects.append(item | {"actions": self.actions(oid, size)})
        self.answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def actions(self, oid, size):
        url = self.server.url
        verify = {"href": f"{url}/lfs/verify", "header": {}}
        if size <= PART:
            return {"upload": {"href": f"{url}/lfs/object/{oid}", "header": {}}, "verify": verify}
        parts = {str(number + 1): f"{url}/lfs/part/{oid}/{number + 1}" for number in range(-(-size // PART))}
        return {
            "upload": {"href": f"{url}/lfs/complete/{oid}", "header": {"chunk_size": str(PART), **parts}},
            "verify": verify,
        }

    def store(self, oid, data):
        if hashlib.sha256(data).hexdigest() != oid:
            self.fail(400, f"the content is not {oid}")
            return
        self.server.objects[oid] = data
        self.answer({}, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def upload(self, data, oid):
        self.store(oid, data)

    def part(self, data, oid, number):
        self.server.parts[oid, int(number)] = data
        self.answer({}, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def complete(self, data, oid):
        numbers = [part["partNumber"] for part in json.loads(data)["parts"]]
        assert numbers == list(range(1, len(numbers) + 1))
        self.store(oid, b"".join(self.server.parts[oid, number] for number in numbers))

    def verify(self, data):
        asked = json.loads(data)
        if len(self.server.objects.get(asked["oid"], b"")) == asked["size"]:
            self.answer({})
        else:
            self.fail(404, "the object has not arrived")

    def commit(self, data, name, revision):
        found = self.repository(name, revision)
        if not found:
            return
        header, *operations = [json.loads(line) for line in data.splitlines()]
        parent, tree = header["value"].get("parentCommit"), dict(found.tree(revision))
        if parent not in (None, found.resolve(revision)):
            self.fail(412, "A commit has happened since. Please refresh and try again.")
            return
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                assert value["encoding"] == "base64"
                tree[value["path"]] = ("regular", base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.server.objects:
                    self.fail(400, f"LFS object of {value['path']} has not arrived")
                    return
                tree[value["path"]] = ("lfs", value["oid"])
            else:
                assert kind == "deletedFile"
                del tree[value["path"]]
        commit = found.commit(revision, tree, header["value"]["summary"])
        self.answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    def resolve(self, _, name, revision, path):
        found = self.repository(name, revision)
        if not found:
            return
        if path not in found.tree(revision):
            self.fail(404, "Entry not found", "EntryNotFound")
            return
        kind, value = found.tree(revision)[path]
        headers = {"X-Repo-Commit": found.resolve(revision)}
        if kind == "lfs":
            size = str(len(self.server.objects[value]))
            # On another host, as in life: the client sends no token there.
            headers |= {
                "X-Linked-Etag": f'"{value}"',
                "X-Linked-Size": size,
                "Location": f"http://localhost:{self.server.server_port}/cdn/{value}",
            }
            self.answer({}, 302, headers)
        else:
            self.answer(headers=headers | {"ETag": f'"{git_hash(value)}"'}, data=value)

    def cdn(self, _, oid):
        self.answer(data=self.server.objects[oid])


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", lambda handler, _: handler.answer({"errors": [], "warnings": []})),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)/?", Handler.listing),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/object/(\w+)", Handler.upload),
    ("PUT", r"/lfs/part/(\w+)/(\d+)", Handler.part),
    ("POST", r"/lfs/complete/(\w+)", Handler.complete),
    ("POST", r"/lfs/verify", Handler.verify),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET", r"/cdn/(\w+)", Handler.cdn),
]
"""Method, path, and what answers it."""


@contextmanager
def fake_hub(monkeypatch, cache, token=TOKEN):
    """Run a hub that huggingface_hub's own client talks to, with an empty cache."""
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
