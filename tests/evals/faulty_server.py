"""An OpenAI-compatible server for tests that misbehaves as told, in a thread."""

import json
import random
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "test-model"
OTHER_NAMES: list[str] = []
NONSENSE = b"200:<html>busy</html>"

# "drop", "hang", "drip", a status ("429", with a Retry-After "429:1"), or the bytes STATUS:BODY
Fault = str | bytes


class FaultyServer(ThreadingHTTPServer):
    """Answers `echo: <last words of the prompt>`; `faults` is asked for each request by its number,
    and returns a fault or None.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        port: int = 0,
        faults: Callable[[int], Fault | None] = lambda number: None,
        answer: str | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.faults, self.answer, self.as_asked = faults, answer, False  # under MODEL's name
        self.bodies: list[dict] = []
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

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
        self.reply(200, {"data": [{"id": name} for name in (MODEL, *OTHER_NAMES)]})

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
            try:
                while not self.server.stopping.wait(0.05):
                    self.wfile.write(b" ")
            except OSError:
                return
        elif isinstance(fault, bytes):
            status, _, content = fault.partition(b":")
            self.reply(int(status), content)
        else:
            status, _, pause = fault.partition(":")
            self.reply(int(status), {"error": {"message": f"made-up {status}"}}, pause)

    def completion(self, body):
        is_chat = "messages" in body
        prompt = body["messages"][-1]["content"] if is_chat else str(body["prompt"])
        text = f"echo: {prompt[-20:]}" if self.server.answer is None else self.server.answer
        choice = {"finish_reason": "stop"}
        choice |= {"message": {"content": text}} if is_chat else {"text": text}
        return {"model": body["model"] if self.server.as_asked else MODEL, "choices": [choice]}

    def reply(self, status, value, pause=""):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        usual = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, text in (usual | ({"Retry-After": pause} if pause else {})).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)


def chaos(seed: int, share: float = 0.3) -> Callable[[int], Fault | None]:
    """A share of the requests get a fault, drawn with the seed."""
    rng = random.Random(seed)
    faults = ["429:0", "500", "503", "drop", "hang", NONSENSE]
    return lambda number: rng.choice(faults) if rng.random() < share else None
