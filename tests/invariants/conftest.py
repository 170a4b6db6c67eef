"""Real processes: trainings started the way users start them, with a hard time limit."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.launch import TIME_LIMIT_S, Child, Forks

PROJECT = Path(__file__).resolve().parents[2]
MEASURED = ("tokens_per_second", "peak_memory_gib")  # of the machine, not of the training


class Launcher:
    """Starts trainings of one recipe in its folder."""

    def __init__(self, recipe: Path, forks: Forks) -> None:
        self.recipe, self.forks = recipe, forks
        self.environment = {"RECIPES_RUNS_ROOT": str(recipe.parent / "runs")}

    def start(
        self,
        *overrides: str,
        config: str | Path | None = None,
        patch: str | None = None,
        **environment: str,
    ) -> Child:
        """Start a training as forked ranks (tests/launch.py), changed by a function of
        patched.py.
        """
        words = [self.recipe, *overrides]
        variables = self.environment | environment
        if patch is None:
            return self.forks.start(words, config, **variables)
        script = Path(__file__).with_name("patched.py")
        return self.forks.start(words, config, script=script, PATCH=patch, **variables)

    def start_really(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        """Start a command line as a user does."""
        return subprocess.Popen(
            command,
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def command(self, *overrides: str, config: str | Path | None = None) -> list[str]:
        """Return what a user types: python, or `accelerate launch` with a config."""
        script = ["-m", "recipes_lib.train", str(self.recipe), *overrides]
        if config is None:
            return [sys.executable, *script]
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        path = PROJECT / "accelerate_configs" / f"{config}.yaml"
        path = config if isinstance(config, Path) else path
        return [accelerate, "launch", "--config_file", str(path), *script]

    def wait(self, child: Child | subprocess.Popen[str]) -> tuple[int, str]:
        if isinstance(child, Child):
            return child.wait()
        try:
            output, _ = child.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
            pytest.fail(f"no end after {TIME_LIMIT_S} s:\n{output[-3000:]}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # no rank is left behind
        return child.returncode, output

    def wait_until(
        self, child: Child | subprocess.Popen[str], condition: Callable[[], bool]
    ) -> None:
        """Wait for a condition that comes true while the training runs."""
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            assert child.poll() is None, self.wait(child)[1][-3000:]
            time.sleep(0.01)

    def wait_for_checkpoint(self, child: Child, step: int, run: Path) -> None:
        marker = run / "checkpoints" / f"checkpoint-{step}" / "COMPLETE.json"
        self.wait_until(child, marker.is_file)

    def wait_for_step(self, child: Any, name: str) -> None:
        """Wait until three lines were logged."""
        file = self.run(name) / "metrics.jsonl"
        self.wait_until(child, lambda: file.is_file() and file.read_text().count("\n") >= 3)

    def train(self, *overrides: str, config: str | Path | None = None, **environment: str) -> str:
        """Train to the end: without a config in this process, which has imported everything."""
        if config is not None:
            code, output = self.start(*overrides, config=config, **environment).wait()
        else:
            code, output = self.train_here(*overrides, **environment)
        assert code == 0, output[-4000:]
        return output

    def break_and_resume(self, name: str, *overrides: str, config: str | Path, step: int) -> None:
        """Kill a rank in a step behind a checkpoint, and train to the end from there."""
        words = [f"run.name={name}", *overrides]
        moment = {"KILL_MOMENT": "in a step", "KILL_STEP": str(step)}
        self.start(*words, config=config, patch="kill", **moment).wait()
        assert (self.run(name) / f"checkpoints/checkpoint-{step - 1}").is_dir()
        self.train(*words, config=config)

    def train_here(self, *overrides: str, **environment: str) -> tuple[int, str]:
        from recipes_lib.train import main

        output = io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment | environment),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            code = main([str(self.recipe), *overrides])
        return code, output.getvalue()

    def run(self, name: str) -> Path:
        return self.recipe.parent / "runs" / name

    def state(self, name: str) -> dict[str, Any]:
        return json.loads((self.run(name) / "run.json").read_text())

    def adapter(self, name: str) -> bytes:
        return (self.run(name) / "adapter" / "adapter_model.safetensors").read_bytes()

    def weights(self, name: str) -> dict[str, bytes]:
        files = self.run(name).glob("*/*.safetensors")
        return {file.name: file.read_bytes() for file in files}

    def series(self, name: str, key: str) -> list[float]:
        lines = [
            json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()
        ]
        return [line[key] for line in lines if key in line]


def written(recipe: Path, name: str) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """The weights and the metrics of a run, without what the machine decides."""
    run = recipe.parent / "runs" / name
    weights = {file.name: file.read_bytes() for file in run.glob("[am]*/*.safetensors")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return weights, [
        {key: value for key, value in line.items() if key not in MEASURED} for line in lines
    ]


@pytest.fixture(scope="module")
def launcher(tiny_model_dir, tmp_path_factory, tiny_recipe_text, forks) -> Launcher:
    """One folder of runs for all tests of a module, so that they can share the runs they compare
    with.
    """
    recipe = tmp_path_factory.mktemp("launched") / "tiny.yaml"
    recipe.write_text(tiny_recipe_text(tiny_model_dir), encoding="utf-8")
    return Launcher(recipe, forks)
