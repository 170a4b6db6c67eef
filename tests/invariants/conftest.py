"""Real processes: trainings started the way users start them, with a hard time limit."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

PROJECT = Path(__file__).resolve().parents[2]
TIME_LIMIT_S = 150


class Launcher:
    """Starts trainings of one recipe in its folder."""

    def __init__(self, recipe: Path) -> None:
        self.recipe = recipe
        self.environment = {
            **os.environ,
            "RECIPES_RUNS_ROOT": str(recipe.parent / "runs"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def command(self, *overrides: str, config: str | Path | None = None) -> list[str]:
        script = ["-m", "recipes_lib.train", str(self.recipe), *overrides]
        if config is None:
            return [sys.executable, *script]
        path = (
            config
            if isinstance(config, Path)
            else PROJECT / "accelerate_configs" / f"{config}.yaml"
        )
        return [
            str(Path(sys.executable).with_name("accelerate")),
            "launch",
            "--config_file",
            str(path),
            *script,
        ]

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self, child: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            said, _ = child.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            self.end_ranks()
            said, _ = child.communicate()
            pytest.fail(f"no end after {TIME_LIMIT_S} s:\n{said[-3000:]}")
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # no rank is left behind
            except ProcessLookupError:
                pass
        return child.returncode, said

    def end_ranks(self) -> None:
        """End every process of this recipe: torch's launcher gives ranks sessions of their own, and
        some wait for each other for ever.
        """
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.recipe).encode() in (process / "cmdline").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue

    def train(self, *overrides: str, config: str | Path | None = None, **environment: str) -> str:
        """Train to the end: without a config in this process, which has imported everything."""
        if config is not None:
            command = self.command(*overrides, config=config)
            code, said = self.wait(self.start(command, **environment))
        else:
            code, said = self.train_here(*overrides, **environment)
        assert code == 0, said[-4000:]
        return said

    def train_here(self, *overrides: str, **environment: str) -> tuple[int, str]:
        from recipes_lib.train import main

        told = io.StringIO()
        with (
            mock.patch.dict(os.environ, {**self.environment, **environment}),
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(told),
        ):
            code = main([str(self.recipe), *overrides])
        return code, told.getvalue()

    def run(self, name: str) -> Path:
        return self.recipe.parent / "runs" / name

    def state(self, name: str) -> dict[str, Any]:
        return json.loads((self.run(name) / "run.json").read_text())

    def adapter(self, name: str) -> bytes:
        return (self.run(name) / "adapter" / "adapter_model.safetensors").read_bytes()

    def series(self, name: str, key: str) -> list[float]:
        lines = [
            json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()
        ]
        return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def launcher(
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_recipe_text: Callable[[Path], str],
) -> Launcher:
    """One folder of runs for all tests of a module, so that they can share the runs they compare
    with.
    """
    recipe = tmp_path_factory.mktemp("launched") / "tiny.yaml"
    recipe.write_text(tiny_recipe_text(tiny_model_dir), encoding="utf-8")
    return Launcher(recipe)
