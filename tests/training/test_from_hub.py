"""A model and rows that lie on the Hub and not on this machine: the first training of everybody who
has a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.training.small_hub import serve

PROJECT = Path(__file__).resolve().parents[2]
ROWS = PROJECT / "recipes" / "quickstart" / "data" / "instructions.jsonl"


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


@pytest.fixture
def train_from(hub, tiny_recipe, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Train the tiny recipe for two steps, in a process of its own with an empty cache."""

    def train(*overrides: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
        environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf")}
        environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        words = ["-m", "recipes_lib.train", str(tiny_recipe), "train.max_steps=2", *overrides]
        return subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300
        )

    return train


@pytest.mark.slow
def test_model_and_rows_are_fetched_and_trained_on(train_from, tmp_path) -> None:
    ended = train_from("model.name_or_path=org/tiny", "data.source=org/rows")
    assert ended.returncode == 0, ended.stderr
    assert "fetching org/tiny from the Hub" in ended.stdout
    assert (tmp_path / "runs/tiny/adapter/adapter_model.safetensors").is_file()
    audit = json.loads((tmp_path / "runs/tiny/supervision.json").read_text())
    assert audit["rows"]["read"] == len(ROWS.read_text(encoding="utf-8").splitlines())


MODEL = "model.name_or_path=org/"
REFUSED = {
    "no such model": ([f"{MODEL}tinny"], 5, ["no model 'org/tinny'", "check the name"]),
    "gated": ([f"{MODEL}gated-tiny"], 5, ["'org/gated-tiny' is gated", "hf auth login"]),
    "no such data set": (["data.source=org/rowz"], 4, ["cannot load 'org/rowz'", "check the name"]),
    "no such split": (["data.source=org/rows", "data.source_split=trian"], 4, ["trian", "train"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_said_in_one_line(case, train_from) -> None:
    overrides, code, words = REFUSED[case]
    ended = train_from(*overrides)
    assert ended.returncode == code, ended.stderr
    assert not [word for word in words if word not in ended.stderr], ended.stderr
    assert "Traceback" not in ended.stderr
