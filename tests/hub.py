"""A small server of models on loopback, as the client of the Hugging Face Hub asks it."""

import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "c0ffee" * 6 + "abcd"

HASTY = """
import time

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.05))

from mlem_dist.cli import main

main()
"""
PROGRAM = (sys.executable, "-c", HASTY)
"""The command line, but that the client of a hub out of reach does not wait 23 seconds between its attempts."""


class Hub(ThreadingHTTPServer):
    """Serves the files of `root`/OWNER/NAME at one commit, which is also the branch main.

    Attributes:
        served: bytes sent, by path of the file.
        break_after: a file is cut off once after so many bytes; None for never.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.served: Counter[str] = Counter()
        self.requests: list[str] = []
        self.break_after: int | None = None
        self.gated: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:  # named by the base class
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def refuse(self, code: str, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bool) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/").removeprefix("datasets/")
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("api/models/"):
            return self.information(path.removeprefix("api/models/"))
        if "/resolve/" not in path:
            return self.refuse("EntryNotFound")
        owner, name, _, revision, *rest = path.split("/")
        if f"{owner}/{name}" in self.server.gated:
            return self.refuse("GatedRepo", 403)
        if revision not in ("main", COMMIT):
            return self.refuse("RevisionNotFound")
        file = self.server.root / owner / name / "/".join(rest)
        if not file.is_file():
            return self.refuse("EntryNotFound")
        self.send_file(file, body)

    def information(self, path: str) -> None:
        owner, name, *rest = path.split("/")
        folder = self.server.root / owner / name
        if not folder.is_dir():
            return self.refuse("RepoNotFound")
        if f"{owner}/{name}" in self.server.gated:
            return self.refuse("GatedRepo", 403)
        if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            return self.refuse("RevisionNotFound")
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        if rest[:1] == ["tree"]:
            content: object = [
                {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": digest(folder / file)}
                for file in files
            ]
        else:
            siblings = [{"rfilename": file} for file in files]
            content = {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
        self.send_bytes(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_bytes(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, file: Path, body: bool) -> None:
        data, start = file.read_bytes(), 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{digest(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        part, limit = data[start:], self.server.break_after
        if limit is not None and len(part) > limit:
            self.server.break_after = None
            part, self.close_connection = part[:limit], True
        self.wfile.write(part)
        self.wfile.flush()
        self.server.served[file.relative_to(self.server.root).as_posix()] += len(part)
        if self.close_connection:
            self.connection.close()


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
