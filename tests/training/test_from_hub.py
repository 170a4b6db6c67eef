"""A model and rows that lie on the Hub and not on this machine: the first training of everybody who
has a GPU.
"""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

PROJECT = Path(__file__).resolve().parents[2]
ROWS = PROJECT / "recipes" / "quickstart" / "data" / "instructions.jsonl"


COMMIT = "a" * 40
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(tree|revision)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a training asks: FOLDER/models/ORG/NAME and FOLDER/datasets/ORG/NAME. A
    model whose name begins with `gated` refuses its files, as the real Hub without a token.
    """

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


@pytest.fixture(scope="module")
def hub(tiny_model_dir, tmp_path_factory) -> Iterator[str]:
    """The address of a Hub with the tiny model, also gated, and the quickstart's rows."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("tiny", "gated-tiny"):
        shutil.copytree(tiny_model_dir, folder / "models" / "org" / name)
    (folder / "datasets/org/rows").mkdir(parents=True)
    shutil.copy(ROWS, folder / "datasets/org/rows/train.jsonl")
    server = serve(folder)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


EACH = """
import json, sys
from recipes_lib.train import main
for words in json.loads(sys.argv[1]):
    print("exit code", main(words), file=sys.stderr, flush=True)
"""


@pytest.fixture
def train_from(hub, tiny_recipe, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Train the tiny recipe for two steps, in another process that knows this Hub, with an empty
    cache; once for each list of overrides.
    """

    def train(*trainings: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
        environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf")}
        environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        usual = [str(tiny_recipe), "train.max_steps=2"]
        words = json.dumps([[*usual, *overrides] for overrides in trainings])
        command, how = [sys.executable, "-c", EACH, words], {"capture_output": True, "text": True}
        return subprocess.run(command, env=environment, timeout=300, **how)

    return train


@pytest.mark.slow
def test_model_and_rows_are_fetched_and_trained_on(train_from, tmp_path) -> None:
    ended = train_from(["model.name_or_path=org/tiny", "data.source=org/rows"])
    assert ended.stderr.endswith("exit code 0\n"), ended.stderr
    assert "fetching org/tiny from the Hub" in ended.stdout
    assert (tmp_path / "runs/tiny/adapter/adapter_model.safetensors").is_file()
    audit = json.loads((tmp_path / "runs/tiny/supervision.json").read_text())
    assert audit["rows"]["read"] == len(ROWS.read_text(encoding="utf-8").splitlines())


MODEL = "model.name_or_path=org/"
REFUSED = [
    ([f"{MODEL}tinny"], 5, ["no model 'org/tinny'", "check the name"]),
    ([f"{MODEL}gated-tiny"], 5, ["'org/gated-tiny' is gated", "hf auth login"]),
    (["data.source=org/rowz"], 4, ["'org/rowz' is not a file or folder", "check the name"]),
    (["data.source=org/rows", "data.source_split=trian"], 4, ["trian", "train"]),
]


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_in_one_line(train_from) -> None:
    ended = train_from(*([*case[0], f"run.name=run-{n}"] for n, case in enumerate(REFUSED)))
    answers = re.findall(r"(?s)(.*?)exit code (\d+)\n", ended.stderr)
    for (said, code), (_, expected, words) in zip(answers, REFUSED, strict=True):
        assert int(code) == expected, said
        assert not [word for word in words if word not in said] and "Traceback" not in said, said
