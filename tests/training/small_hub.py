"""A Hub on this machine, as much of it as a training asks: it serves FOLDER/models/ORG/NAME and
FOLDER/datasets/ORG/NAME. A model whose name begins with `gated` answers about itself and refuses
its files, as the real Hub does without a token.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "a" * 40
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(tree|revision)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if asked := API.fullmatch(path):
            self.describe(*asked.groups())
        elif asked := FILE.fullmatch(path):
            self.send_file(*asked.groups())
        else:
            self.reply(200 if path == "/" else 404)

    do_HEAD = do_GET

    def describe(self, kind: str, name: str, what: str | None, _: Any, below: str | None) -> None:
        folder = self.root / kind / name
        if not folder.is_dir():
            return self.reply(404, X_Error_Code="RepoNotFound")
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        files = [
            {"type": "file", "path": path, "rfilename": path, "size": size, "oid": "0" * 40}
            for path, size in sizes.items()
            if path.startswith(below or "")
        ]
        whole = {"id": name, "sha": COMMIT, "siblings": files}
        return self.reply(200, json.dumps(files if what == "tree" else whole).encode())

    def send_file(self, dataset: str | None, name: str, file: str) -> None:
        path = self.root / ("datasets" if dataset else "models") / name / file
        if "/gated" in name:
            return self.reply(403, X_Error_Code="GatedRepo")
        if not path.is_file():
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content = path.read_bytes()
        return self.reply(
            200, content, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(content).hexdigest()}"'
        )

    def reply(self, code: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def serve(root: Path) -> http.server.ThreadingHTTPServer:
    """Serve a folder in a thread of this process."""
    handler = type("HubOf", (Hub,), {"root": root})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
