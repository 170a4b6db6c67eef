"""Stands in for the vllm program: `vllm serve MODEL --served-model-name NAME ... --port N ...`
answers every question with a verdict.

A model called `broken` ends at once, as vLLM does where the memory does not suffice; `mortal` ends
when the file `stop` appears; `usurped` goes by no name but its own, as a server that somebody else
started does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evals"))
import faulty_server


def option(words: list[str], name: str) -> list[str]:
    """The values of the last option of that name."""
    start = len(words) - words[::-1].index(name)
    end = next(
        (place for place, word in enumerate(words) if place >= start and word.startswith("--")),
        len(words),
    )
    return words[start:end]


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[1] == "broken":
        sys.exit("ValueError: no memory for the cache")
    print(*words, flush=True)
    faulty_server.MODEL, *faulty_server.OTHER_NAMES = option(words, "--served-model-name")
    if words[1] == "usurped":
        faulty_server.OTHER_NAMES = []
    time.sleep(0.5)
    with faulty_server.FaultyServer(
        int(option(words, "--port")[0]), answer="A is fuller. [RESULT] A"
    ):
        while not (words[1] == "mortal" and Path("stop").exists()):
            time.sleep(0.1)
    sys.exit("RuntimeError: the engine died")
