"""A small server of the hub's shape, for one dataset: info, tree, paths and files with ranges."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `files` of dataset `owner/name` on a free local port.

    Attributes:
        files: path to content.
        requests: (method, path, Range header) of every request so far.
        broken_off: (path, byte): the download that holds this byte breaks off there, once.
        held: (path, byte): the download that holds this byte stops there until `let_go` is set.
        is_held, let_go: whether one is held, and what ends the hold.
        spoiled: paths that come with a changed byte.
    """

    repository = "owner/name"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[tuple[str, str, str | None]] = []
        self.broken_off: set[tuple[str, int]] = set()
        self.held: set[tuple[str, int]] = set()
        self.is_held = threading.Event()
        self.let_go = threading.Event()
        self.spoiled: set[str] = set()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def downloads(self) -> list[tuple[str, str | None]]:
        """(path, Range header) of every download."""
        return [(p.split(COMMIT + "/")[1], r) for m, p, r in self.requests if m == "GET" and
                "/resolve/" in p]  # fmt: skip

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_hub
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        api = f"/api/datasets/{hub.repository}"
        resolve = f"/datasets/{hub.repository}/resolve/{COMMIT}/"
        if path in (
            api,
            f"{api}/revision/main",
            f"{api}/revision/v1.0",
            f"{api}/revision/refs/convert/parquet",
            f"{api}/revision/{COMMIT}",
        ):
            self._json({"id": hub.repository, "sha": COMMIT, "siblings": [], "tags": []})
        elif path.startswith(f"{api}/revision/"):
            self._error("RevisionNotFound")
        elif path == f"{api}/paths-info/{COMMIT}":
            self._json(self._paths_info(_wanted_paths(body)))
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            folder = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            self._json([_entry(p, c) for p, c in hub.files.items() if p.startswith(folder)])
        elif path.startswith(resolve):
            self._file(path.removeprefix(resolve))
        else:
            self._error("RepoNotFound")

    def _paths_info(self, paths: list[str]) -> list[dict[str, Any]]:
        files = self.server_hub.files
        found = [_entry(path, files[path]) for path in paths if path in files]
        folders = [p for p in paths if any(f.startswith(p + "/") for f in files)]
        return found + [{"type": "directory", "path": p, "oid": "0" * 40} for p in folders]

    def _file(self, path: str) -> None:
        hub = self.server_hub
        if path not in hub.files:
            self._error("EntryNotFound")
            return
        content = hub.files[path]
        wanted = self.headers.get("Range")
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content)) + 1, len(content))
        if path in hub.spoiled:
            content = content[:-1] + b"?"
        part = content[start:end]
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if any(held[0] == path and start <= held[1] < end for held in hub.held):
            hub.is_held.set()
            hub.let_go.wait()
            self.close_connection = True
            return
        for broken in [b for b in hub.broken_off if b[0] == path and start <= b[1] < end]:
            hub.broken_off.remove(broken)
            part = content[start : broken[1]]
            self.close_connection = True
        self.wfile.write(part)

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _wanted_paths(body: bytes) -> list[str]:
    try:
        return list(json.loads(body)["paths"])
    except ValueError:
        return parse_qs(body.decode())["paths"]


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {"type": "file", "path": path, "size": len(content), "oid": oid, "lfs": lfs}
