"""launch/vllm_server.sh with a stand-in for vllm that writes down what it is asked to serve."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch/vllm_server.sh"


@pytest.fixture
def serve(tmp_path):
    """A function that runs the script and returns its result and the words vllm got."""
    words = tmp_path / "words.txt"
    vllm = tmp_path / "own env" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text(f'#!/bin/sh\nfor word in "$@"; do printf \'%s\\n\' "$word"; done > "{words}"\n')
    vllm.chmod(vllm.stat().st_mode | stat.S_IXUSR)

    def run(*arguments: str, **environment: str):
        words.unlink(missing_ok=True)
        done = subprocess.run(
            [str(SCRIPT), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "VLLM": str(vllm), **environment},
        )
        return done, words.read_text().splitlines() if words.exists() else []

    return run


def make_run(folder: Path, rank: int = 8, base: str = "org/base model", **config: object) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "adapter/adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": base, "r": rank, **config})
    )
    return folder


def test_a_model_is_served_under_its_own_name_and_further_words_go_on(serve):
    done, words = serve("org/judge", "--port", "8001")
    assert done.returncode == 0
    assert words == ["serve", "org/judge", "--served-model-name", "org/judge", "--port", "8001"]


def test_an_adapter_is_served_on_its_base_with_a_rank_that_vllm_knows_and_that_suffices(
    serve, tmp_path
):
    ranks = ((4, {}, "8"), (8, {}, "8"), (9, {}, "16"), (16, {"q_proj": 100}, "128"))
    for number, (rank, pattern, limit) in enumerate(ranks):
        run = make_run(tmp_path / f"run{number}", rank, rank_pattern=pattern)
        _, words = serve(f"{run}/")
        base = ["serve", "org/base model", "--served-model-name", "org/base model"]
        lora = ["--enable-lora", "--max-lora-rank", limit, "--lora-modules"]
        assert words == [*base, *lora, f"run{number}={run}/adapter"]


def test_whole_weights_of_a_run_come_before_its_adapter(serve, tmp_path):
    run = make_run(tmp_path / "my-run")
    for folder in ("model", "merged"):
        (run / folder).mkdir()
        (run / folder / "config.json").write_text("{}")
        _, words = serve(str(run))
        assert words == ["serve", f"{run}/{folder}", "--served-model-name", "my-run"]


def test_what_cannot_be_served_is_said_with_our_exit_codes(serve, tmp_path):
    done, words = serve()
    assert done.returncode == 2 and "vllm_server.sh" in done.stderr and not words
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/run.json").write_text("{}")
    done, words = serve(str(tmp_path / "empty"))
    assert (
        done.returncode == 2 and "has no merged/, model/ or adapter/" in done.stderr and not words
    )
    run = make_run(tmp_path / "huge", 1024)
    done, words = serve(str(run))
    assert done.returncode == 2 and "rank 1024" in done.stderr and not words
    run = make_run(tmp_path / "packaged", base=str(tmp_path / "gone"))
    done, words = serve(str(run))
    assert done.returncode == 2 and "gone" in done.stderr and not words
    done, words = serve("org/judge", VLLM="no-such-vllm")
    assert done.returncode == 5 and "no-such-vllm" in done.stderr


def test_the_script_is_clean_for_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
