"""A real HTTP server on this machine that answers as told, also badly, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from frpo.rewards.judges.client import Endpoint
from frpo.types import Completion, Prompt


@dataclass
class Reply:
    """``drop``: close without a word; ``cut``: bytes of the body kept back; ``drip_s``: seconds between its bytes."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drop: bool = False
    cut: int = 0
    drip_s: float = 0.0


@dataclass
class Asked:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float

    @property
    def text(self) -> str:
        """The last message, or the input of a moderation."""
        return self.body["messages"][-1]["content"] if "messages" in self.body else self.body["input"]


class JudgeServer:
    def __init__(self, behave: Callable[[Asked, int], Reply]) -> None:
        self.behave = behave  # gets the request and how often its text was asked before
        self.asked: list[Asked] = []
        self.most_in_flight = self._in_flight = 0
        self.dead = False
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._post(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that give up

        self._httpd = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._httpd.server_port}/v1"
        threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.dead = True
        self._httpd.shutdown()
        self._httpd.server_close()

    def times(self, text: str) -> list[float]:
        return [asked.at for asked in self.asked if asked.text == text]

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        asked = Asked(handler.path, dict(handler.headers), body, time.monotonic())
        with self._lock:
            before = len(self.times(asked.text))
            self.asked.append(asked)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        reply = self.behave(asked, before)
        time.sleep(reply.delay_s)
        with self._lock:
            self._in_flight -= 1
        if reply.drop or self.dead:
            handler.close_connection = True
        else:
            self._write(handler, reply)

    def _write(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("Transfer-Encoding" if reply.drip_s else "Content-Length", _length(reply))
        handler.end_headers()
        if reply.drip_s:
            for byte in reply.body:
                handler.wfile.write(b"1\r\n" + bytes([byte]) + b"\r\n")
                time.sleep(reply.drip_s)
            handler.wfile.write(b"0\r\n\r\n")
        else:
            handler.wfile.write(reply.body[: len(reply.body) - reply.cut])
        handler.close_connection = handler.close_connection or bool(reply.cut)


def _length(reply: Reply) -> str:
    return "chunked" if reply.drip_s else str(len(reply.body))


@contextmanager
def serving(behave: Callable[[Asked, int], Reply]) -> Iterator[JudgeServer]:
    server = JudgeServer(behave)
    try:
        yield server
    finally:
        if not server.dead:
            server.stop()


def says(text: str | None, **more: Any) -> Reply:
    """A well-formed chat completion."""
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    return Reply(body=json.dumps(body).encode(), **more)


def endpoint(server: JudgeServer | str, **settings: Any) -> Endpoint:
    """An impatient one."""
    url = server if isinstance(server, str) else server.url
    quick = {"first_wait_s": 0.01, "longest_wait_s": 0.05, "read_timeout_s": 30.0, "deadline_s": 60.0, "retries": 3}
    return Endpoint(**{"base_url": url, "model": "judge", **quick, **settings})


def chat(text: str) -> dict[str, Any]:
    return {"model": "judge", "messages": [{"role": "user", "content": text}]}


def completion(text: str, prompt: str = "Hi", **fields: Any) -> Completion:
    row = Prompt(id="0", messages=({"role": "user", "content": prompt},), task="t", fields=fields)
    return Completion(prompt=row, prompt_text=f"<user> {prompt}", text=text, length=1)
