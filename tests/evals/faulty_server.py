"""An OpenAI-compatible server for tests that misbehaves as told, in a thread."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "test-model"
OTHER_NAMES: list[str] = []


class FaultyServer(ThreadingHTTPServer):
    """Answers `echo: <last words of the prompt>`; `faults` is asked for each request and returns a
    fault or None.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        port: int = 0,
        faults: Callable[[int], str | None] = lambda number: None,
        answer: str | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.faults, self.answer = faults, answer
        self.bodies: list[dict] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=lambda: self.serve_forever(poll_interval=0.02), daemon=True).start()
        return self

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that is gone is no error
            super().handle_error(request, client_address)

    def __exit__(self, *_):
        self.stopping.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "test"}
            for name in (MODEL, *OTHER_NAMES)
        ]
        self.reply(200, {"object": "list", "data": models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            number = len(self.server.bodies)
        fault = self.server.faults(number)
        if fault is None:
            self.reply(200, self.completion(body))
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "hang":
            self.server.stopping.wait(30)
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            while not self.server.stopping.wait(0.05):
                try:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                except OSError:
                    return
        elif isinstance(fault, tuple):  # (status, location)
            self.wfile.write(
                b"HTTP/1.1 %s Moved\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % fault
            )
        elif isinstance(fault, bytes):  # STATUS[/ENCODING]:BODY
            head, _, body = fault.partition(b":")
            status, _, encoding = head.decode().partition("/")
            self.raw(int(status), body, {"Content-Encoding": encoding} if encoding else {})
        elif fault.startswith("body:"):
            self.raw(200, fault.removeprefix("body:").encode())
        elif fault == "nonsense":
            self.raw(200, b"<html>busy</html>")
        else:
            status, _, pause = fault.partition(":")
            self.reply(
                int(status),
                {"error": {"message": f"made-up {status}"}},
                {"Retry-After": pause} if pause else {},
            )

    def completion(self, body):
        text = self.server.answer
        if "messages" in body:
            text = text if text is not None else "echo: " + body["messages"][-1]["content"][-20:]
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
            if body.get("logprobs"):
                top = [
                    {"token": " A", "logprob": -0.1, "bytes": None},
                    {"token": " B", "logprob": -2.5, "bytes": None},
                ]
                choice["logprobs"] = {
                    "content": [
                        {"token": " A", "logprob": -0.1, "bytes": None, "top_logprobs": top}
                    ]
                }
            kind = "chat.completion"
        else:
            text = text if text is not None else f"echo: {str(body['prompt'])[-20:]}"
            choice = {"index": 0, "finish_reason": "stop", "text": text, "logprobs": None}
            if body.get("logprobs"):
                choice["logprobs"] = {
                    "tokens": [" A"],
                    "token_logprobs": [-0.1],
                    "top_logprobs": [{" A": -0.1, " B": -2.5}],
                    "text_offset": [0],
                }
            kind = "text_completion"
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        return {
            "id": "x",
            "object": kind,
            "created": 0,
            "model": MODEL,
            "choices": [choice],
            "usage": usage,
        }

    def reply(self, status, value, headers=None):
        self.raw(status, json.dumps(value).encode(), headers or {})

    def raw(self, status, content, headers=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def chaos(seed: int, share: float = 0.3) -> Callable[[int], str | None]:
    """A share of the requests get a fault, drawn with the seed."""
    rng = random.Random(seed)
    return lambda number: (
        rng.choice(["429:0", "500", "503", "drop", "hang", "nonsense"])
        if rng.random() < share
        else None
    )
