"""`recipes train RECIPE [section.key=value ...]`: start the training script the way the recipe's
`launch` section says.

It prints the plain command it stands for, runs it, hands signals on, and returns the exit code that
the launcher would lose.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import psutil

from recipes_lib.commands import flag_words
from recipes_lib.config.launch import TRAIN_FLAGS, Launch, place_machine, plan_launch_of
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import ExitCode, print_error
from recipes_lib.core.files import object_or_none, write_text
from recipes_lib.core.lock import is_held
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import next_step, say
from recipes_lib.plan.cards import devices_here
from recipes_lib.training.checkpoints import list_checkpoints, what_is_missing
from recipes_lib.training.process import EXIT_CODE_FILE, STOPPING, handling

_LETTING_GO_S = 5.0  # a killed rank takes a moment to let go of the run
_PR_SET_CHILD_SUBREAPER = 36


def run(
    recipe: Annotated[str, "path or name of a recipe"],
    overrides: Sequence[str],
    debug: bool,
    typed: Sequence[str],
    *,
    accelerate: Annotated[
        str | None, "a file in accelerate_configs/, or a path; default: launch.accelerate"
    ] = None,
    gpus: Annotated[int | None, "processes on each machine; default: launch.gpus"] = None,
    nodes: Annotated[int | None, "machines; default: launch.nodes. Run this on each"] = None,
    machine_rank: Annotated[
        int | None, "of several machines: the number of this one, from 0", 0
    ] = None,
    main_process_ip: Annotated[
        str | None, "of several machines: name or address of machine 0"
    ] = None,
    main_process_port: Annotated[
        int | None, "of several machines: a free port of machine 0; default: the config's"
    ] = None,
    dry_run: Annotated[bool, "print the command and do nothing"] = False,
    resume_anyway: Annotated[bool, TRAIN_FLAGS["resume_anyway"]] = False,
    allow_partial_resume: Annotated[bool, TRAIN_FLAGS["allow_partial_resume"]] = False,
    trust_remote_code: Annotated[bool, TRAIN_FLAGS["trust_remote_code"]] = False,
) -> int:
    """Launch, wait, and return the training's own exit code."""
    loaded = load_recipe(recipe, overrides)
    launch = plan_launch_of(loaded, accelerate, gpus, nodes)
    this_command = shlex.join(["recipes", *(word for word in typed if word != "--dry-run")])
    launch = place_machine(launch, machine_rank, main_process_ip, main_process_port, this_command)
    flags = flag_words(
        resume_anyway=resume_anyway,
        allow_partial_resume=allow_partial_resume,
        trust_remote_code=trust_remote_code,
        debug=debug,
    )
    command = launch.command(["-m", "recipes_lib.train", recipe, *overrides, *flags])
    if launch.config.use_cpu and launch.world_size == 1 and devices_here():
        # `python -m` alone would take the GPU
        command = ["env", "ACCELERATE_USE_CPU=true", *command]
    say(f"$ {shlex.join(command)}")
    if dry_run:
        for warning in loaded.warnings:  # a training says them itself
            print_error(warning)
        next_step(this_command)
        return ExitCode.DONE
    if launch.rank:
        say(f"machine {launch.rank} of {launch.machines}: the training prints on machine 0")
    return supervise(command, loaded, launch)


def supervise(command: list[str], recipe: Recipe, launch: Launch) -> int:
    """Run the command in a session of its own and return what the training script reported.

    A first Ctrl-C or SIGTERM asks for a checkpoint through the STOP file: the launcher would kill
    its ranks 30 s after a signal. A second Ctrl-C ends everything at once; so does the first before
    the first step, when there is nothing to save.
    """
    run = RunDirectory(recipe.name)
    expected = {"world_size": launch.world_size, "distributed_type": launch.distributed_type}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "exit_code"
        environment = {**os.environ, EXIT_CODE_FILE: str(report)}
        environment["RECIPES_EXPECT"] = json.dumps(expected)
        if launch.config.use_cpu:
            # one process is started without accelerate launch, which would say it
            environment["ACCELERATE_USE_CPU"] = "true"
        training = _Training(run)
        with handling(training.on_signal):
            launcher = subprocess.Popen(command, env=environment, start_new_session=True)
            status = training.wait(launcher)
            # rank 0 cannot report where the disk is full or it was killed
            text = report.read_text(encoding="utf-8") if report.is_file() else ""
            if text.isdecimal():
                return int(text)
            code = training.exit_code or (status if status > 0 else ExitCode.FAILED)
            if not launch.rank:
                _record_end(run, training.killed, code)
            return code


class _Training:
    """The processes of a training as `recipes train` sees them. `killed` says how they were ended
    where a signal ended them at once, and `exit_code` what that means.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.killed = ""
        self.exit_code = 0
        self._signals: list[int] = []
        self._ended = False
        self._others = psutil.Process().children()
        self._began = _steps_began(run)
        # a rank whose launcher died becomes a child of this process, and can be found
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask for a checkpoint, or end everything."""
        self._signals.append(number)
        if self._ended or self.killed:
            return
        interrupted = signal.SIGINT in self._signals
        if self._signals.count(signal.SIGINT) > 1:
            self.killed = "interrupted at once"
        elif _steps_began(self.run) in (None, self._began):
            self.killed = f"{'interrupted' if interrupted else 'stopped'} before the first step"
        if self.killed:
            self.exit_code = ExitCode.INTERRUPTED if interrupted else ExitCode.PREEMPTED
            self._kill()
            return
        try:
            write_text(self.run.stop_file, "INT" if number == signal.SIGINT else "")
            say(STOPPING)
        except OSError as error:
            say(f"no checkpoint can be asked for: {error}; Ctrl-C again ends it at once")

    def wait(self, launcher: subprocess.Popen[bytes]) -> int:
        """Wait for the end, and let no rank outlive its launcher; return the launcher's status."""
        if self.killed:  # by a signal that came while it was being started
            self._kill()
        status = launcher.wait()
        self._ended = True  # what is left is to record it: a Ctrl-C more does not keep us from that
        psutil.wait_procs(self._kill(), timeout=_LETTING_GO_S)
        return status

    def _kill(self) -> list[psutil.Process]:
        """Kill every process below this one that was not there before."""
        below = psutil.Process().children(recursive=True)
        processes = [process for process in below if process not in self._others]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return processes


def _record_end(run: RunDirectory, killed: str, code: int) -> None:
    """Say and record how a training ended that could not do so itself. A run that another process
    holds is that one's.
    """
    what = killed or "the training ended without a word"
    if run.exists() and run.read_state()["state"] == "running" and not is_held(run.path):
        run.write_state("preempted" if killed else "failed", exit_code=code, error=what)
    elif not killed:
        return
    complete = [path for path in list_checkpoints(run.checkpoints) if what_is_missing(path) is None]
    resume = "the same command starts from the beginning: there is no complete checkpoint"
    if complete:
        resume = f"run the same command again to resume from {complete[-1].name}"
    say(f"{what} (exit {code}): {resume}")


def _steps_began(run: RunDirectory) -> str | None:
    """Return when the newest attempt's first step began; None if none has."""
    state = object_or_none(run.state_file) or {}
    return state.get("steps_began") if state.get("state") == "running" else None
