"""A local server that speaks as OpenAI's chat completions do, with faults on demand."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from milepost.runs.ratings import CRITERIA

Body = dict[str, Any]
SERVED_NAME = "judge-1-served"


def scores_of(body: Body) -> dict[str, int]:
    """What this judge thinks: by the length of the completion, each criterion a little apart."""
    material = body["messages"][1]["content"]
    completion = re.search(r"--- continuation \w+ ---\n(.*)\n--- end", material, re.DOTALL)
    assert completion is not None, material
    level = min(10, len(completion.group(1)) // 12)
    return {name: max(0, level - place % 3) for place, name in enumerate(CRITERIA)}


class JudgeServer:
    """Answers on a free port of this machine while the block lasts.

    Attributes:
        requests: bodies of the chat requests that came, in order.
        keys: the Authorization header of each.
        faults: what the next chat requests get instead of an answer, one each: a reply's text, a
            status to refuse with, or "hang", "cut", "refuse", "page", "uncounted".
        refused_forms: types of response_format that are refused with 400.
        before_reply: called before each reply is sent, with the number of requests so far.
    """

    def __init__(self) -> None:
        self.requests: list[Body] = []
        self.keys: list[str | None] = []
        self.faults: list[str | int] = []
        self.refused_forms: set[str] = set()
        self.model = "judge-1"
        self.before_reply: Callable[[int], None] = lambda count: None
        self.released = threading.Event()
        self._lock = threading.Lock()

    @property
    def base_url(self) -> str:
        """What --base-url takes."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        handler = type("Handler", (_Handler,), {"judge": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def take(self, body: Body, *, key: str | None) -> str | int | None:
        """Notes a request; returns its fault."""
        with self._lock:
            self.requests.append(body)
            self.keys.append(key)
            fault = self.faults.pop(0) if self.faults else None
            count = len(self.requests)
        self.before_reply(count)
        return fault


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "judge-1", "object": "model"}]})

    def do_POST(self) -> None:
        judge = self.judge
        size = int(self.headers["Content-Length"])
        sent = self.rfile.read(size)
        if len(sent) < size:
            return  # the client has left in the middle
        body = json.loads(sent)
        fault = judge.take(body, key=self.headers["Authorization"])
        if self.path != "/v1/chat/completions":
            self._send(404, {"detail": "Not Found"})
        elif body["model"] != judge.model:
            self._send(404, _error(f"The model '{body['model']}' does not exist"))
        elif body.get("response_format", {}).get("type") in judge.refused_forms:
            self._send(400, _error("response_format is not supported"))
        elif fault == "hang":
            judge.released.wait(30)
        elif fault == "page":
            self._send_bytes(200, b"<html>It works!</html>", "text/html")
        elif isinstance(fault, int):
            self._send(fault, _error(f"fault {fault}"))
        else:
            self._send(200, _completion(body, fault=fault))

    def _send(self, status: int, document: Body) -> None:
        self._send_bytes(status, json.dumps(document).encode(), "application/json")

    def _send_bytes(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *words: Any) -> None:
        """Says nothing."""


def _error(message: str) -> Body:
    return {"error": {"message": message, "type": "invalid_request_error", "code": None}}


def _completion(body: Body, *, fault: str | None) -> Body:
    known = fault in (None, "cut", "refuse", "uncounted")
    text = json.dumps(scores_of(body)) if known else fault
    message = {"role": "assistant", "content": None if fault == "refuse" else text}
    if fault == "refuse":
        message["refusal"] = "I will not."
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "length" if fault == "cut" else "stop",
    }
    completion = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1767603600,
        "model": SERVED_NAME,
        "choices": [choice],
    }
    if fault == "uncounted":
        return completion
    usage = {"prompt_tokens": 500, "completion_tokens": 50, "total_tokens": 550}
    return completion | {"usage": usage}
