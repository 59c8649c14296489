"""The hub's HTTP interface over folders of this machine: what down- and uploads need."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Hub:
    """Repositories by id, what was asked of them, and what goes wrong.

    Attributes:
        asked: (method, path, range) of every request.
        gated: ids that are refused.
        breaks: file -> bytes after which its next transfer breaks off, once.
        new: where repositories are made that are asked for.
        private: ids that were made so.
        sent: large files that were uploaded, by digest; one is refused for each of `full`.
    """

    repos: dict[str, Path]
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    breaks: dict[str, int] = field(default_factory=dict)
    endpoint: str = ""
    new: Path = Path()
    private: set[str] = field(default_factory=set)
    sent: dict[str, bytes] = field(default_factory=dict)
    full: int = 0

    def fetched(self, suffix: str) -> int:
        """Bytes asked for of files with a suffix; of whole files all of them."""
        total = 0
        for method, path, span in self.asked:
            if method == "GET" and path.endswith(suffix) and "/resolve/" in path:
                match = FILE.fullmatch(path)
                assert match is not None
                size = (self.repos[match[1]] / match[3]).stat().st_size
                first, last = span.removeprefix("bytes=").split("-") if span else ("0", "")
                total += min(int(last or size - 1), size - 1) - int(first) + 1
        return total


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub on a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            if hub.full:
                hub.full -= 1
                self._body()
                self._refuse(400, "DiskFull")
                return
            hub.sent[self.path.rpartition("/")[2]] = self._body()
            self._send(200, b"", {})

        def do_POST(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self._body()
            hub.asked.append((self.command, path, ""))
            if path == "/api/repos/create":
                said = json.loads(body)
                repo = f"{said['organization']}/{said['name']}"
                if repo not in hub.repos:
                    hub.repos[repo] = hub.new / repo
                    hub.repos[repo].mkdir(parents=True)
                if said.get("private") or said.get("visibility") == "private":
                    hub.private.add(repo)
                self._json({"url": f"{hub.endpoint}/{repo}"})
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif match := BATCH.fullmatch(path):
                self._json(
                    {"transfer": "basic", "objects": [*map(_place, json.loads(body)["objects"])]}
                )
            elif (match := UPLOAD.fullmatch(path)) and match[2] == "preupload":
                self._json({"files": [_mode(f["path"]) for f in json.loads(body)["files"]]})
            elif match:
                self._commit(match[1], [json.loads(x) for x in body.splitlines()])
            else:
                self._refuse(404, "EntryNotFound")

        def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
            folder = hub.repos[repo]
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    continue
                file = folder / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                if line["key"] == "file":
                    file.write_bytes(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    file.write_bytes(hub.sent[value["oid"]])
                elif line["key"] == "deletedFile":
                    file.unlink()
            url = f"{hub.endpoint}/{repo}/commit/{COMMIT}"
            self._json({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _json(self, body: Any) -> None:
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def log_message(self, format: str, *args: Any) -> None:
            """Stays silent."""

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
            if match := MODEL.fullmatch(path):
                self._model(match[1], match[2] or "main")
            elif match := TREE.fullmatch(path):
                self._tree(match[1], match[2])
            elif match := FILE.fullmatch(path):
                self._file(match[1], match[2], match[3])
            else:
                self._refuse(404, "EntryNotFound")

        def _known(self, repo: str, revision: str) -> bool:
            if repo not in hub.repos:
                self._refuse(404, "RepoNotFound")
            elif repo in hub.gated:
                self._refuse(403, "GatedRepo")
            elif revision not in ("main", COMMIT):
                self._refuse(404, "RevisionNotFound")
            else:
                return True
            return False

        def _model(self, repo: str, revision: str) -> None:
            if self._known(repo, revision):
                folder = hub.repos[repo]
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                siblings = [_sibling(folder, file) for file in files]
                self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

        def _tree(self, repo: str, revision: str) -> None:
            if self._known(repo, revision):
                folder = hub.repos[repo]
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                self._json([_in_tree(folder, file) for file in files])

        def _file(self, repo: str, revision: str, name: str) -> None:
            if not self._known(repo, revision):
                return
            file = hub.repos[repo] / name
            if not file.is_file():
                self._refuse(404, "EntryNotFound")
                return
            data = file.read_bytes()
            headers = {
                "ETag": f'"{_etag(file)}"',
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(data)),
                "Accept-Ranges": "bytes",
            }
            span = self.headers.get("Range")
            if span is None:
                self._send(200, data, headers, name)
                return
            first, last = span.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1 if last else None]
            end = int(first) + len(part) - 1
            headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
            self._send(206, part, headers, name)

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if name in hub.breaks and "Range" not in self.headers:
                self.wfile.write(body[: hub.breaks.pop(name)])
                self.close_connection = True
                return
            self.wfile.write(body)

    def _place(wanted: dict[str, Any]) -> dict[str, Any]:
        oid = wanted["oid"]
        upload = {"upload": {"href": f"{hub.endpoint}/put/{oid}"}}
        return {**wanted, **({} if oid in hub.sent else {"actions": upload})}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin")) or name == "tokenizer.json"


def _mode(name: str) -> dict[str, Any]:
    mode = "lfs" if _large(name) else "regular"
    return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}


def _etag(file: Path) -> str:
    data = file.read_bytes()
    if _large(file.name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _in_tree(folder: Path, file: Path) -> dict[str, Any]:
    size, path = file.stat().st_size, file.relative_to(folder).as_posix()
    said: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": _etag(file)}
    if _large(file.name):
        said["lfs"] = {"oid": _etag(file), "size": size, "pointerSize": 134}
    return said


def _sibling(folder: Path, file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    name = file.relative_to(folder).as_posix()
    said: dict[str, Any] = {"rfilename": name, "size": size, "blobId": _etag(file)}
    if _large(file.name):
        said["lfs"] = {"sha256": _etag(file), "size": size, "pointerSize": 134}
    return said
