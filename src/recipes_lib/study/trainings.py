"""The trainings of a study on this machine: `recipes train` for each arm and seed, some at a time,
each with its own run directory.

A training that is left over from a killed runner, or that a cluster job does, is waited for; a run
that was trained with other settings is moved away, never overwritten.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from recipes_lib.compare.design import Study
from recipes_lib.config.recipe import HANDED, RECIPE_FILE
from recipes_lib.core.atomic_files import write_json
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.fingerprints import digest_of
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.run_lock import describe_holder, is_held
from recipes_lib.planning.cards import devices_here
from recipes_lib.study.arms import arm_recipe, launch_words, move_aside, study_folder, train_words
from recipes_lib.study.graph import Failure, Graph, Step, changed_inputs
from recipes_lib.study.tuning import validation_loss
from recipes_lib.training.resume_guard import recipe_differences
from recipes_lib.weights.base import weight_hashes
from recipes_lib.weights.check import read_check

_POLL_S = 0.2


@dataclass
class _Training:
    """One `recipes train` that runs."""

    step: Step
    process: subprocess.Popen[bytes]
    started: float
    log: Path | None = None
    stream: IO[bytes] | None = None
    devices: tuple[str, ...] = ()


class Trainings:
    """Runs the training steps of a study.

    Args:
        study: the study.
        graph: its steps.
        jobs: trainings at the same time.
        say: prints a line.
        flags: further options of `recipes train`.
    """

    def __init__(
        self,
        study: Study,
        graph: Graph,
        jobs: int,
        say: Callable[[str], None],
        flags: Sequence[str] = (),
    ) -> None:
        self.study, self.graph, self.jobs, self.say = study, graph, jobs, say
        self.flags = list(flags)
        self.failed: dict[str, Failure] = {}
        self.stopped: int | None = None
        self.signals: list[int] = []
        self.running: list[_Training] = []
        self.announced: set[str] = set()
        # One training at a time has the whole machine. Several share its GPUs out, each as many as
        # its launch starts processes.
        self.devices = devices_here() if jobs > 1 else []

    def run(self, steps: Sequence[Step]) -> None:
        """Train every step's run; failures are in `failed`, and `stopped` is the exit code where
        somebody asked to stop.
        """
        waiting = list(steps)
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._stop) for number in signals}
        try:
            while (waiting and self.stopped is None) or self.running:
                self._start_next(waiting)
                time.sleep(_POLL_S)
                while self.signals:
                    number = self.signals.pop(0)
                    for training in self.running:
                        training.process.send_signal(number)
                for training in [one for one in self.running if one.process.poll() is not None]:
                    self.running.remove(training)
                    self._ended(training)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_next(self, waiting: list[Step]) -> None:
        """Start the trainings that there is room for, in order: many small ones do not keep a large
        one waiting.
        """
        while (
            self.stopped is None
            and len(self.running) < self.jobs
            and (step := self._next(waiting)) is not None
        ):
            taken = [device for training in self.running for device in training.devices]
            devices = free_devices(self.devices, taken, self._wanted(step))
            if devices is None:
                break
            waiting.remove(step)
            self._start(step, devices)

    def _next(self, waiting: Sequence[Step]) -> Step | None:
        """The first run that nobody else is training."""
        for step in waiting:
            folder = RunDirectory(step.run).path
            if not is_held(folder):
                return step
            if step.run not in self.announced:
                self.announced.add(step.run)
                self.say(
                    f"{step.run} is being trained{describe_holder(folder / 'lock.json')}: waiting"
                    " for it"
                )
        return None

    def _wanted(self, step: Step) -> int:
        """How many GPUs a training takes; a launch for the CPU takes none."""
        launch = self.study.arm(step.arm).launch
        said = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return 0 if launch.config.use_cpu or said else launch.per_machine

    def _stop(self, number: int, frame: object) -> None:
        """Note a signal, which `run` hands on, each once: `recipes train` checkpoints and ends, and
        a second Ctrl-C ends it at once.

        Not handed on from here, because a training that is just being started is not among the
        running ones yet.
        """
        self.stopped = int(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.PREEMPTED)
        self.signals.append(number)

    def _start(self, step: Step, devices: tuple[str, ...]) -> None:
        """Start one training on these GPUs, or take over one that has reached its end."""
        run = RunDirectory(step.run)
        try:
            self._clear_way(step, run)
        except RecipesError as error:
            self._fail(step, error)
            return
        if self.stopped is not None:
            return
        if run.exists() and run.read_state()["state"] == "finished":
            self._finish(step, run, 0.0)
            return
        arm = self.study.arm(step.arm)
        assert step.seed is not None
        words = [*train_words(self.study, arm, step.seed), *launch_words(arm), *self.flags]
        if self.jobs > 1 and arm.launch.world_size > 1 and arm.launch.machines == 1:
            # two launchers that start together would both take the usual port
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                words += ["--main-process-port", str(free.getsockname()[1])]
        recipe = self.graph.folder / step.name / RECIPE_FILE
        arm_recipe(self.study, arm, step.seed).write(recipe)
        environment = {**os.environ, HANDED: str(recipe)}
        shown = shlex.join(["recipes", "train", *words])
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
            shown = f"CUDA_VISIBLE_DEVICES={','.join(devices)} {shown}"
        log, stream = None, None
        if self.jobs > 1:
            log = study_folder(self.study) / "logs" / f"{step.run}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            stream = log.open("ab")
            shown += f"   # output: {log}"
        self.say(f"\n$ {shown}")
        process = subprocess.Popen(
            train_command(words),
            env=environment,
            stdout=stream,
            stderr=stream,
            preexec_fn=functools.partial(_die_with_parent, os.getpid()),
            # so that a terminal's Ctrl-C reaches it through us alone and not twice
            start_new_session=True,
        )
        self.running.append(_Training(step, process, time.monotonic(), log, stream, devices))

    def _clear_way(self, step: Step, run: RunDirectory) -> None:
        """Note what is going to be trained; a run of other settings or other data is moved into the
        study's folder first.
        """
        note = self.graph.folder / step.name / "started.json"
        if run.exists():
            other: list[str] = []
            begun = self.graph.read(step.name, "started.json")
            state = run.read_state()
            if begun:
                other = changed_inputs(begun["inputs"], step.inputs)
                if (before := begun.get("version", 1)) != step.version:
                    other.append(f"code {before} -> {step.version}")
            elif guard := state.get("guard"):  # trained by hand, or by a cluster's job
                recipe = arm_recipe(self.study, self.study.arm(step.arm), step.seed or 0)
                other = list(recipe_differences(recipe, guard))
            if state["state"] == "finished" and _weights(run) is None:
                other.append("its weights are gone")
            if other:
                why, away = ", ".join(other[:3]), move_aside(self.study, run.path)
                self.say(f"{step.run} is out of date ({why}): moved to {away}")
        write_json(note, {"inputs": dict(step.inputs), "version": step.version})

    def _ended(self, training: _Training) -> None:
        """Record how a training ended."""
        if training.stream:
            training.stream.close()
        step, code = training.step, training.process.returncode
        run = RunDirectory(step.run)
        if code == ExitCode.DONE and run.exists() and run.read_state()["state"] == "finished":
            self._finish(step, run, time.monotonic() - training.started)
        elif code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED) or self.stopped is not None:
            self.stopped = self.stopped or code
        elif code == ExitCode.NUMERICS and step.kind == "tune":
            self.say(f"{step.run}: diverged; this value cannot be chosen")
            seconds = round(time.monotonic() - training.started, 1)
            self.graph.finish(step, digest_of(None), [], seconds=seconds, loss=None)
        else:
            recorded = run.read_state().get("error") if run.exists() else None
            where = f"its output is in {training.log}" if training.log else "its message is above"
            error = recorded or f"the training ended with exit code {code}"
            error += f"; {where}" if training.log or not recorded else ""
            self._fail(step, error, code if code > 0 else None)

    def _finish(self, step: Step, run: RunDirectory, seconds: float) -> None:
        """Record a finished training: its result is the hash of its weights and of the prompt
        format it was trained in; in a tuning its validation loss.
        """
        state, folder = run.read_state(), _weights(run)
        assert folder is not None
        summary = state.get("summary") or {}
        took = round(seconds or float(summary.get("seconds") or 0), 1)
        if step.kind == "tune":  # its weights are never read again
            loss = validation_loss(run, summary)
            if loss is None:
                self._fail(step, "no validation loss was logged")
                return
            self.graph.finish(step, digest_of(loss), [], seconds=took, loss=loss)
        else:
            check, prompts = read_check(folder), state.get("guard", {}).get("prompt_format_hash")
            result = digest_of([check.sha256 if check else weight_hashes(folder), prompts])
            curves = [run.metrics] if run.metrics.is_file() else []
            files = [*sorted(folder.glob("*.safetensors")), *curves]
            self.graph.finish(step, result, files, seconds=took)
        self.say(f"{step.run}: trained" + ("" if seconds else " before"))

    def _fail(self, step: Step, error: RecipesError | str, code: int | None = None) -> None:
        self.failed[step.name] = failure = self.graph.fail(step, error, code)
        self.say(f"{step.run}: failed (exit code {failure.exit_code}); the other arms go on")


def free_devices(
    devices: Sequence[str], taken: Collection[str], wanted: int
) -> tuple[str, ...] | None:
    """Return the devices that a training gets, or None while too few are free.

    Where the machine has fewer than it wants it gets all of them, alone, and says itself that they
    are too few.

    Example:
        >>> free_devices(["0", "1", "2"], ["1"], 2), free_devices(["0", "1"], ["1"], 2), free_devices([], [], 2)
        (('0', '2'), None, ())
    """  # noqa: E501
    wanted = min(wanted, len(devices))
    free = [device for device in devices if device not in taken]
    return tuple(free[:wanted]) if len(free) >= wanted else None


def train_command(words: Sequence[str]) -> list[str]:
    """Return the process that trains."""
    return [sys.executable, "-m", "recipes_lib.cli", "train", *words]


def _weights(run: RunDirectory) -> Path | None:
    """The folder of a finished run's weights, its adapter or its model; None where somebody removed
    it.
    """
    folders = (run.weights(False), run.weights(True))
    return next((folder for folder in folders if any(folder.glob("*.safetensors"))), None)


def _die_with_parent(parent: int) -> None:
    """Ask Linux to send SIGTERM to this process when the runner ends, however it ends: a killed
    study leaves no training behind.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before it could be asked
            os._exit(1)
