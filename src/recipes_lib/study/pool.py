"""Trainings of a study on this machine: a `recipes train` process for each, some at a time, each
with GPUs of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.lock import describe_holder, is_held
from recipes_lib.core.project import shown_path
from recipes_lib.plan.cards import devices_here
from recipes_lib.study.arms import launch_words, study_folder
from recipes_lib.study.config import Study
from recipes_lib.study.runs import (
    StudyRun,
    forget_data,
    move_aside,
    note_data,
    settings_changed,
    weights_of,
)

_POLL_S = 0.2


@dataclass(frozen=True)
class Failure:
    """Why something failed, in one line, and the exit code."""

    error: str
    exit_code: int = int(ExitCode.FAILED)


@dataclass
class _Process:
    """One `recipes train` that runs."""

    training: StudyRun
    process: subprocess.Popen[bytes]
    devices: tuple[str, ...]
    log: Path | None
    stream: IO[bytes] | None


class Pool:
    """Trains runs; after `run`, `failed` has the failures by run, and `stopped` the exit code where
    somebody asked to stop.

    Args:
        study: the study.
        jobs: trainings at the same time. One has the whole machine; several share its GPUs out,
            each as many as its launch starts processes.
        say: prints a line.
        flags: further options of `recipes train`.
    """

    def __init__(
        self, study: Study, jobs: int, say: Callable[[str], None], flags: Sequence[str] = ()
    ) -> None:
        self.study, self.jobs, self.say, self.flags = study, jobs, say, list(flags)
        self.failed: dict[str, Failure] = {}
        self.stopped: int | None = None
        self._signals: list[int] = []
        self._running: list[_Process] = []
        self._announced: set[str] = set()
        self._devices = devices_here() if jobs > 1 else []

    def run(self, trainings: Sequence[StudyRun]) -> None:
        """Train all of them. A signal is handed on to each once: `recipes train` writes a
        checkpoint and ends.
        """
        waiting = list(trainings)
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            while (waiting and self.stopped is None) or self._running:
                self._start_next(waiting)
                time.sleep(_POLL_S)
                while self._signals:
                    number = self._signals.pop(0)
                    for running in self._running:
                        running.process.send_signal(number)
                for ended in [one for one in self._running if one.process.poll() is not None]:
                    self._running.remove(ended)
                    self._ended(ended)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        """Note a signal. It is handed on by `run`: a training that is just being started is not
        among the running ones yet.
        """
        self.stopped = int(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.PREEMPTED)
        self._signals.append(number)

    def _start_next(self, waiting: list[StudyRun]) -> None:
        """Start what there is room for, in order: small trainings do not keep a large one
        waiting.
        """
        while self.stopped is None and len(self._running) < self.jobs:
            training = self._next(waiting)
            if training is None:
                return
            taken = [device for running in self._running for device in running.devices]
            devices = free_devices(self._devices, taken, _gpus_wanted(training))
            if devices is None:
                return
            waiting.remove(training)
            self._start(training, devices)

    def _next(self, waiting: Sequence[StudyRun]) -> StudyRun | None:
        """The first run that no other process is training."""
        for training in waiting:
            folder = training.directory.path
            if not is_held(folder):
                return training
            if training.run not in self._announced:
                self._announced.add(training.run)
                holder = describe_holder(folder / "lock.json")
                self.say(f"{training.run} is being trained{holder}: waiting for it")
        return None

    def _start(self, training: StudyRun, devices: tuple[str, ...]) -> None:
        """Start one training, unless another process finished it meanwhile; a run of other settings
        is moved away first.
        """
        try:
            if self._clear_way(training):
                self.say(f"{training.run}: trained before")
                return
        except RecipesError as error:
            self._fail(training, str(error), int(error.exit_code))
            return
        if self.stopped is not None:
            return
        recipe = study_folder(self.study) / "recipes" / f"{training.run}.yaml"
        training.recipe(self.study).write(recipe)
        words = [shown_path(recipe), *launch_words(training.arm), *self.flags]
        environment = dict(os.environ)
        shown = shlex.join(["recipes", "train", *words])
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
            shown = f"CUDA_VISIBLE_DEVICES={','.join(devices)} {shown}"
        log, stream = None, None
        if self.jobs > 1:
            log = study_folder(self.study) / "logs" / f"{training.run}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            stream = log.open("ab")
            shown += f"   # output: {log}"
        self.say(f"\n$ {shown}")
        process = subprocess.Popen(
            train_command(words),
            env=environment,
            stdout=stream,
            stderr=stream,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
            start_new_session=True,  # so that a terminal's Ctrl-C does not reach it twice
        )
        self._running.append(_Process(training, process, devices, log, stream))

    def _clear_way(self, training: StudyRun) -> bool:
        """Move a run of other settings away, and note the data; True where the run is finished."""
        run = training.directory
        if run.exists():
            state = run.read_state()
            finished = state["state"] == "finished"
            other = settings_changed(self.study, training, state)
            if finished and weights_of(run) is None:
                other.append("its weights are gone")
            if other:
                place = move_aside(run)
                forget_data(self.study, training.run)
                self.say(
                    f"{training.run} had other settings ({', '.join(other[:3])}): moved to {place}"
                )
            elif finished:
                return True
        note_data(self.study, training)
        return False

    def _ended(self, ended: _Process) -> None:
        """Say how a training ended."""
        if ended.stream:
            ended.stream.close()
        training, code = ended.training, ended.process.returncode
        run = training.directory
        state = run.read_state() if run.exists() else None
        if code == ExitCode.DONE and state and state["state"] == "finished":
            self.say(f"{training.run}: trained")
        elif code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED) or self.stopped is not None:
            self.stopped = self.stopped or code
        else:
            said = state.get("error") if state else None
            where = f"its output is in {ended.log}" if ended.log else "its message is above"
            error = said or f"the training ended with exit code {code}"
            error += f"; {where}" if ended.log or not said else ""
            self._fail(training, error, code if code > 0 else int(ExitCode.FAILED))

    def _fail(self, training: StudyRun, error: str, code: int) -> None:
        self.failed[training.run] = Failure(error, code)
        self.say(f"{training.run}: failed (exit code {code}); the other trainings go on")


def _gpus_wanted(training: StudyRun) -> int:
    """How many GPUs a training takes; a launch for the CPU takes none."""
    launch = training.arm.launch
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return 0 if launch.config.use_cpu or on_cpu else launch.per_machine


def free_devices(
    devices: Sequence[str], taken: Collection[str], wanted: int
) -> tuple[str, ...] | None:
    """Return the devices that a training gets, or None while too few are free.

    Where the machine has fewer than it wants it gets all of them, alone, and says itself that they
    are too few.

    Example:
        >>> free_devices(["0", "1", "2"], ["1"], 2)
        ('0', '2')
        >>> free_devices(["0", "1"], ["1"], 2), free_devices([], [], 2)
        (None, ())
    """
    wanted = min(wanted, len(devices))
    free = [device for device in devices if device not in taken]
    return tuple(free[:wanted]) if len(free) >= wanted else None


def train_command(words: Sequence[str]) -> list[str]:
    """Return the process that trains."""
    return [sys.executable, "-m", "recipes_lib.cli", "train", *words]


def die_with_parent(parent: int) -> None:
    """Ask Linux to send SIGTERM to this process when the one that started it ends: a killed study
    leaves no training behind.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before it could be asked
            os._exit(1)
