"""launch/vllm_server.sh with a stand-in for vllm that writes down what it is asked to serve."""

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch/vllm_server.sh"


@pytest.fixture
def serve(tmp_path):
    """A function that runs the script and returns its result and the words vllm got."""
    words, vllm = tmp_path / "words.txt", tmp_path / "own env" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text(f'#!/bin/sh\nfor word in "$@"; do printf \'%s\\n\' "$word"; done > "{words}"\n')
    vllm.chmod(0o755)

    def run(*arguments: object, **environment: str):
        words.unlink(missing_ok=True)
        command, given = [SCRIPT, *map(str, arguments)], {"VLLM": str(vllm), **environment}
        how = {"capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(command, env={**os.environ, **given}, **how)
        return done, words.read_text().splitlines() if words.exists() else []

    return run


def make_run(folder: Path, rank: int = 8, base: str = "org/base model", **config: object) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    values = {"base_model_name_or_path": base, "r": rank, **config}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(values))
    return folder


def test_a_run_is_served_as_whole_weights_or_on_its_base_with_a_rank_that_suffices(serve, tmp_path):
    here = ["--host", "127.0.0.1"]
    _, words = serve("org/judge", "--port", "8001")
    judge = ["serve", "org/judge", "--served-model-name", "org/judge"]
    assert words == [*judge, *here, "--port", "8001"]
    ranks = ((4, {}, "8"), (8, {}, "8"), (9, {}, "16"), (16, {"q_proj": 100}, "128"))
    for number, (rank, pattern, limit) in enumerate(ranks):
        run = make_run(tmp_path / f"run{number}", rank, rank_pattern=pattern)
        base = ["serve", "org/base model", "--served-model-name", "org/base model"]
        lora = ["--enable-lora", "--max-lora-rank", limit, "--lora-modules"]
        assert serve(f"{run}/")[1] == [*base, *lora, f"run{number}={run}/adapter", *here]
    quantized = {"guard": {"quantization": {"load_in_4bit": True}}}
    (run / "run.json").write_text(json.dumps(quantized))
    done, words = serve(run)
    assert done.returncode == 2 and f"recipes merge {run.name}" in done.stderr and not words
    for folder in ("model", "merged"):
        (run / folder).mkdir()
        (run / folder / "config.json").write_text("{}")
        assert serve(run)[1] == ["serve", f"{run}/{folder}", "--served-model-name", run.name, *here]


def test_what_cannot_be_served_is_said_with_our_exit_codes(serve, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/run.json").write_text("{}")
    cases = {
        (): "vllm_server.sh",
        (tmp_path / "empty",): "has no merged/, model/ or adapter/",
        (make_run(tmp_path / "huge", 1024),): "rank 1024",
        (make_run(tmp_path / "packaged", base=str(tmp_path / "gone")),): "gone",
    }
    for arguments, what in cases.items():
        done, words = serve(*arguments)
        assert done.returncode == 2 and what in done.stderr and not words
    done, words = serve("org/judge", VLLM="no-such-vllm")
    assert done.returncode == 5 and "no-such-vllm" in done.stderr
