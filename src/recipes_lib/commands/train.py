"""`recipes train RECIPE [section.key=value ...]`: start the training script the way the recipe's
`launch` section says.

It prints the plain command it stands for, runs it, hands signals on, and returns the exit code that
the launcher would lose.
"""

from __future__ import annotations

import argparse
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

import psutil

from recipes_lib.commands import at_least, flag_words
from recipes_lib.config.launch import (
    TRAIN_FLAGS,
    Launch,
    add_train_flags,
    place_machine,
    plan_launch_of,
)
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import ExitCode, print_error
from recipes_lib.core.files import object_or_none, write_text
from recipes_lib.core.lock import is_held
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import next_step, say
from recipes_lib.plan.cards import devices_here
from recipes_lib.training.checkpoints import list_checkpoints, what_is_missing
from recipes_lib.training.process import EXIT_CODE_FILE, STOPPING, handling

LETTING_GO_S = 5.0  # a killed rank takes a moment to let go of the run
PR_SET_CHILD_SUBREAPER = 36
OPTIONS = ("accelerate", "gpus", "nodes")
PLACE = ("machine_rank", "main_process_ip", "main_process_port")
FLAGS = (*TRAIN_FLAGS, "debug")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    recipe = "path or name of a recipe; any `section.key=value` after it overrides a value"
    add("recipe", metavar="RECIPE", help=recipe)
    config = "a file in accelerate_configs/, or a path; default: the recipe's launch.accelerate"
    add("--accelerate", metavar="NAME", help=config)
    gpus = "processes on each machine; default: launch.gpus, else the accelerate config's"
    add("--gpus", type=at_least(1), metavar="N", help=gpus)
    nodes = "machines; default: launch.nodes, else the accelerate config's. Run this on each"
    add("--nodes", type=at_least(1), metavar="N", help=nodes)
    rank = "with several machines: the number of this one, from 0"
    add("--machine-rank", type=at_least(0), metavar="N", help=rank)
    host = "with several machines: name or address of machine 0"
    add("--main-process-ip", metavar="HOST", help=host)
    port = "with several machines: a free port of machine 0; default: the config's"
    add("--main-process-port", type=at_least(1), metavar="PORT", help=port)
    add("--dry-run", action="store_true", help="print the command and do nothing")
    add_train_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Launch, wait, and return the training's own exit code."""
    recipe = load_recipe(args.recipe, args.overrides)
    launch = plan_launch_of(recipe, args.accelerate, args.gpus, args.nodes)
    place = (args.machine_rank, args.main_process_ip, args.main_process_port)
    launch = place_machine(launch, *place, typed=typed_command(args, OPTIONS))
    flags = flag_words(args, FLAGS)
    script = ["-m", "recipes_lib.train", args.recipe, *args.overrides, *flags]
    command = launch.command(script)
    if launch.config.use_cpu and launch.world_size == 1 and devices_here():
        # `python -m` alone would take the GPU
        command = ["env", "ACCELERATE_USE_CPU=true", *command]
    say(f"$ {shlex.join(command)}")
    if args.dry_run:
        for warning in recipe.warnings:  # a training says them itself
            print_error(warning)
        next_step(typed_command(args, (*OPTIONS, *PLACE)))
        return ExitCode.DONE
    if launch.rank:
        say(
            f"machine {launch.rank} of 0 to {launch.machines - 1}: what the training says is"
            " printed on machine 0"
        )
    return supervise(command, recipe, launch)


def typed_command(args: argparse.Namespace, options: Sequence[str]) -> str:
    """Return the command as it was typed, with the named options that were given, without
    --dry-run.
    """
    words = ["recipes", "train", args.recipe, *args.overrides]
    for name in options:
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return shlex.join([*words, *flag_words(args, FLAGS)])


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
        training = LaunchedTraining(run)
        with handling(training.on_signal):
            status = training.wait(
                subprocess.Popen(command, env=environment, start_new_session=True)
            )
            reported = _reported(report)
            if not launch.rank and reported is None:
                _record_end(run, training, status)
    if reported is not None:
        return reported
    if training.killed:
        return training.exit_code
    return ExitCode.FAILED if status < 0 else status


class LaunchedTraining:
    """The processes of a training as `recipes train` sees them.

    `killed` says how they were ended where a signal ended them at once.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.killed = ""
        self._signals: list[int] = []
        self._ended = False
        self._others = psutil.Process().children()
        self._began = _steps_began(run)
        # a rank whose launcher died becomes a child of this process, and can be found
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    @property
    def exit_code(self) -> ExitCode:
        """What a signal that ended the training at once means."""
        interrupted = signal.SIGINT in self._signals
        return ExitCode.INTERRUPTED if interrupted else ExitCode.PREEMPTED

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask for a checkpoint, or end everything."""
        self._signals.append(number)
        if self._ended or self.killed:
            return
        what = "interrupted" if signal.SIGINT in self._signals else "stopped"
        if self._signals.count(signal.SIGINT) > 1:
            self.killed = f"{what} at once"
        elif _steps_began(self.run) in (None, self._began):
            self.killed = f"{what} before the first step"
        if self.killed:
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
        psutil.wait_procs(self._kill(), timeout=LETTING_GO_S)
        return status

    def _kill(self) -> list[psutil.Process]:
        """Kill every process below this one that was not there before."""
        below = psutil.Process().children(recursive=True)
        processes = [process for process in below if process not in self._others]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return processes


def _record_end(run: RunDirectory, training: LaunchedTraining, status: int) -> None:
    """Say and record how a training ended that could not do so itself. A run that another process
    holds is that one's.
    """
    goes_on = how_to_go_on(run)
    mine = run.exists() and run.read_state()["state"] == "running" and not is_held(run.path)
    if training.killed:
        if mine:
            code = int(training.exit_code)
            run.write_state("preempted", exit_code=code, error=training.killed)
        say(f"{training.killed}: {goes_on}")
    elif mine:
        what = "the process ended without a word"
        run.write_state("failed", exit_code=int(ExitCode.FAILED), error=what)
        say(f"the training ended without a word (exit {status}); what it saved is kept")
        next_step(goes_on)


def how_to_go_on(run: RunDirectory) -> str:
    """Return what the same command will do."""
    complete = [path for path in list_checkpoints(run.checkpoints) if what_is_missing(path) is None]
    if complete:
        return f"run the same command again to resume from {complete[-1].name}"
    return "there is no complete checkpoint, the same command starts from the beginning"


def _steps_began(run: RunDirectory) -> str | None:
    """Return when the newest attempt's first step began; None where none has."""
    state = object_or_none(run.state_file) or {}
    return state.get("steps_began") if state.get("state") == "running" else None


def _reported(report: Path) -> int | None:
    """Return the exit code that rank 0 reported; None where it could not, as on a full disk."""
    try:
        return int(report.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
