"""Stands in for the vllm program: `vllm serve MODEL --served-model-name NAME ... --port N ...`
answers every question with a verdict.

A model called `broken` ends at once, as vLLM does where the memory does not suffice; `mortal` ends
when the file `stop` appears; `usurped` goes by no name but its own, as a server that somebody else
started does.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evals"))
import faulty_server

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs=2)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--port", type=int)
    options, model = parser.parse_known_args()[0], sys.argv[2]
    if model == "broken":
        sys.exit("ValueError: no memory for the cache")
    print(*sys.argv[1:], flush=True)
    faulty_server.MODEL, *faulty_server.OTHER_NAMES = options.served_model_name
    if model == "usurped":
        faulty_server.OTHER_NAMES = []
    time.sleep(0.5)
    with faulty_server.FaultyServer(options.port, answer="A is fuller. [RESULT] A"):
        while not (model == "mortal" and Path("stop").exists()):
            time.sleep(0.1)
    sys.exit("RuntimeError: the engine died")
