"""Stands in for the vllm program: `vllm serve MODEL --served-model-name NAME --port N ...` answers every question with a verdict.

A model called `broken` ends at once, as vLLM does where the memory does not suffice.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "generation"))
import faulty_server

if __name__ == "__main__":
    words = sys.argv[1:]
    options = dict(zip(words[2::2], words[3::2], strict=False))
    if words[1] == "broken":
        sys.exit("ValueError: no memory for the cache")
    print(*words, flush=True)
    faulty_server.MODEL = options["--served-model-name"]
    time.sleep(0.5)
    with faulty_server.FaultyServer(int(options["--port"]), answer="A is fuller. [RESULT] A"):
        while True:
            time.sleep(1)
