"""Which YAML files the processes of a command open."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

# Python imports a module of this name by itself when it starts.
HOOK = """
import os, sys
def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".yaml", ".yml")):
        if "r" in str(arguments[1]):
            rank, words = os.environ.get("RANK", ""), " ".join(sys.orig_argv[1:])
            with open(os.environ["OPENED"], "a") as log:
                log.write(f"{arguments[0]}|{rank}|{words}\\n")
sys.addaudithook(note)
"""


class Opened(NamedTuple):
    """A file that was read, by which rank, and the words its process was started with."""

    path: Path
    rank: str
    words: str


def run_and_watch(
    command: list[str], folder: Path, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[Opened]]:
    """Run a command; return how it ended, and every YAML file that it or a process below it
    read.
    """
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    log, places = folder / "opened", [str(folder / "hook")]
    places += filter(None, [os.environ.get("PYTHONPATH")])
    variables = {"PYTHONPATH": os.pathsep.join(places), "OPENED": str(log)}
    done = subprocess.run(
        command,
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = log.read_text().splitlines() if log.is_file() else []
    parts = (line.split("|", 2) for line in lines)
    return done, [Opened(Path(path), rank, words) for path, rank, words in parts]
