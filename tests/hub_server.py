"""A Hub on loopback: the routes that huggingface_hub and timm ask, for repositories that live in memory."""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

API = re.compile(r"/api/models/(?P<repo>[^/?]+/[^/?]+)(?:/revision/(?P<revision>[^/?]+))?(?:\?.*)?$")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
SMALL = 10_000  # bytes; larger files are in the large file storage, which tells their SHA-256


@dataclass
class Repository:
    files: dict[str, bytes]
    license: str = "apache-2.0"
    gated: bool = False
    allowed: set[str] = field(default_factory=set)  # tokens
    stated: dict[str, str] = field(default_factory=dict)  # SHA-256 that the Hub says of a file, where it is a wrong one

    @property
    def commit(self):
        return sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def digest(self, name):
        return self.stated.get(name, sha256(self.files[name]).hexdigest())

    def knows(self, revision):
        return revision in {None, "main", "v1", self.commit}

    def about(self, repo):
        return {
            "_id": "0",
            "id": repo,
            "sha": self.commit,
            "private": False,
            "gated": "auto" if self.gated else False,
            "tags": [],
            "cardData": {"license": self.license},
            "siblings": [self.file(name) for name in self.files],
        }

    def file(self, name):
        size = len(self.files[name])
        large = {"lfs": {"sha256": self.digest(name), "size": size, "pointerSize": 134}} if size > SMALL else {}
        return {"rfilename": name, "size": size, "blobId": sha1(self.files[name]).hexdigest(), **large}


class Hub(ThreadingHTTPServer):
    """Serves ``repositories``; the next ``cuts`` answers break off in the middle of a large file."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_good", "hf_other"}  # that the Hub knows; it refuses others whatever they ask
        self.cuts = 0
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range

    def handle_error(self, *_):
        """Say nothing of connections that a test drops."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        asked = API.match(self.path) or RESOLVE.match(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        repository = self.server.repositories.get(asked["repo"]) if asked else None
        name = asked.groupdict().get("file") if asked else None
        if problem := self.problem(repository, asked, name, token):
            self.refuse(*problem)
        elif name is None:
            self.send(json.dumps(repository.about(asked["repo"])).encode(), {"Content-Type": "application/json"})
        else:
            self.send_file(repository, name, body=body)

    def problem(self, repository, asked, name, token):
        """Status, code and message with which the Hub refuses, or nothing."""
        shut = name and repository and repository.gated and token not in repository.allowed
        problems = [
            (token and token not in self.server.tokens, 401, None, "Invalid credentials in Authorization header"),
            (repository is None, 404 if token else 401, "RepoNotFound", "Repository not found"),
            (repository and not repository.knows(asked["revision"]), 404, "RevisionNotFound", "Invalid rev id"),
            (shut, 403 if token else 401, "GatedRepo", "Access to this model is restricted."),
            (name and repository and name not in repository.files, 404, "EntryNotFound", "Entry not found"),
        ]
        return next((rest for wrong, *rest in problems if wrong), None)

    def send_file(self, repository, name, *, body):
        whole, large = repository.files[name], len(repository.files[name]) > SMALL
        tag = repository.digest(name) if large else sha1(whole).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(len(whole))}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        cut = body and large and self.server.cuts > 0
        self.server.cuts -= cut
        self.send(whole[start:], headers, body=body, status=206 if start else 200, cut=cut)

    def send(self, whole, headers, *, body=True, status=200, cut=False):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(whole))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(whole[: len(whole) // 2] if cut else whole)
        self.close_connection = cut

    def refuse(self, status, code, message):
        self.send(
            json.dumps({"error": message}).encode(),
            {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message},
            body=self.command != "HEAD",
            status=status,
        )

    def log_message(self, *_):
        """Keep quiet."""


@contextmanager
def running():
    """Give a Hub that answers until the end of the context."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()
