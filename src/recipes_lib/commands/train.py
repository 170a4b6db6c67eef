"""`recipes train RECIPE [section.key=value ...]`: start the training script the way the recipe's
`launch` section says.

It prints the plain command it stands for, runs it, hands signals on, and returns the exit code that
the launcher would lose.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from recipes_lib.config.launch import (
    TRAIN_FLAGS,
    Launch,
    add_train_flags,
    place_machine,
    plan_launch_of,
)
from recipes_lib.config.recipe import HANDED, RECIPE_FILE, Recipe, handed_recipe
from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.errors import ExitCode, print_error
from recipes_lib.core.ranks import SEEN, STAGE_FILE
from recipes_lib.core.run_directory import RunDirectory, State
from recipes_lib.core.run_lock import is_held
from recipes_lib.core.terminal import at_least, flag_words, next_step, say
from recipes_lib.planning.cards import cards_here
from recipes_lib.planning.gate import plan_for_here, refuse_what_cannot_fit
from recipes_lib.training.checkpoints import list_checkpoints, what_is_missing
from recipes_lib.training.process import EXIT_CODE_FILE, handling

LETTING_GO_S = 5.0
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
    no_plan = "start although the plan says that memory will not do (see: recipes plan)"
    add("--no-plan", action="store_true", help=no_plan)
    add_train_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Launch, wait, and return the training's own exit code."""
    recipe = handed_recipe(args.recipe, args.overrides)
    launch = plan_launch_of(recipe, args.accelerate, args.gpus, args.nodes)
    place = (args.machine_rank, args.main_process_ip, args.main_process_port)
    launch = place_machine(launch, *place, typed=typed_command(args, OPTIONS))
    flags = flag_words(args, FLAGS)
    script = ["-m", "recipes_lib.train", args.recipe, *args.overrides, *flags]
    command = launch.command(script)
    if launch.config.use_cpu and launch.world_size == 1 and cards_here():
        # `python -m` alone would take the GPU
        command = ["env", "ACCELERATE_USE_CPU=true", *command]
    say(f"$ {shlex.join(command)}")
    if args.dry_run:
        for warning in recipe.warnings:  # a training says them itself
            print_error(warning)
        next_step(typed_command(args, (*OPTIONS, *PLACE)))
        return ExitCode.DONE
    if not args.no_plan:
        _check_plan(recipe, launch)
    if launch.rank:
        say(
            f"machine {launch.rank} of 0 to {launch.machines - 1}: what the training says is"
            " printed on machine 0"
        )
    return supervise(command, recipe, launch)


def _check_plan(recipe: Recipe, launch: Launch) -> None:
    """Stop here if the plan says that the training cannot fit the card that is there.

    Raises:
        EnvironmentFault: with the arithmetic.
    """
    run = RunDirectory(recipe.name)
    if run.exists() and run.read_state()["state"] == "finished":
        return
    plan = plan_for_here(recipe, launch)
    warning = None if plan is None else refuse_what_cannot_fit(plan)
    if warning:
        say(warning)


def typed_command(args: argparse.Namespace, options: Sequence[str]) -> str:
    """Return the command as it was typed, with the named options that were given, without
    --dry-run.
    """
    words = ["recipes", "train", args.recipe, *args.overrides]
    for name in options:
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return shlex.join([*words, *flag_words(args, (*FLAGS, "no_plan"))])


def supervise(command: list[str], recipe: Recipe, launch: Launch) -> int:
    """Run the command in its own process group and return what the training script reported.

    A first Ctrl-C or SIGTERM asks for a checkpoint, a second Ctrl-C ends everything at once; so
    does the first before the first step, when there is nothing to save.
    """
    run = RunDirectory(recipe.name)
    expected = {"world_size": launch.world_size, "distributed_type": launch.distributed_type}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "exit_code"
        stage_file = Path(folder) / "stage"
        recipe.write(Path(folder) / RECIPE_FILE)
        environment = {**os.environ, EXIT_CODE_FILE: str(report), STAGE_FILE: str(stage_file)}
        environment[HANDED] = str(Path(folder) / RECIPE_FILE)
        environment["RECIPES_EXPECT"] = json.dumps(expected)
        if launch.config.use_cpu:
            # one process is started without accelerate launch, which would say it
            environment["ACCELERATE_USE_CPU"] = "true"
        child: subprocess.Popen[bytes] | None = None
        asked: list[int] = []
        at_once, ended = "", False

        def forward(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            if child is not None and not ended:
                answer(child, number)

        def answer(child: subprocess.Popen[bytes], number: int) -> None:
            nonlocal at_once
            stage = _read_stage(stage_file)
            if at_once:
                return
            if stage is None or asked.count(signal.SIGINT) > 1:
                at_once = "before the first step" if stage is None else "at once"
                _kill_all(child.pid, report)
                return
            if launch.world_size == 1:
                child.send_signal(number)
            else:
                # the launcher would kill its workers after 30 s: ask them through the file instead
                _ask_to_stop(run, number, report)
            say(SEEN[stage])

        with handling(forward):
            child = subprocess.Popen(command, env=environment, start_new_session=True)
            if asked:  # while it was being started
                answer(child, asked[-1])
            child.wait()
            # What is left is to record the end: one Ctrl-C more must not keep it from that.
            ended = True
            _kill_all(child.pid, report)  # no rank outlives its launcher
            reported = _reported(report)
            code = child.returncode if reported is None else reported
            if at_once and reported is None:
                code = ExitCode.INTERRUPTED if signal.SIGINT in asked else ExitCode.PREEMPTED
                what = "interrupted" if signal.SIGINT in asked else "stopped"
                if not launch.rank:
                    note_end(run, "preempted", code, f"{what} {at_once}")
                    say(f"{what} {at_once}: {how_to_go_on(run)}")
            elif (
                reported is None
                and not launch.rank
                and note_end(run, "failed", ExitCode.FAILED, "the process ended without a word")
            ):
                say(f"the training ended without a word (exit {code}); what it saved is kept")
                next_step(how_to_go_on(run))
    return ExitCode.FAILED if code < 0 else code


def note_end(run: RunDirectory, state: State, code: ExitCode, error: str) -> bool:
    """Record how a training that was killed ended, which left run.json `running`; return whether it
    had. A run that another process holds is that one's; a killed rank takes a moment to let go.
    """
    end = time.monotonic() + LETTING_GO_S
    while is_held(run.path) and time.monotonic() < end:
        time.sleep(0.1)
    if not run.exists() or run.read_state()["state"] != "running" or is_held(run.path):
        return False
    run.write_state(state, exit_code=int(code), error=error)
    return True


def how_to_go_on(run: RunDirectory) -> str:
    """Return what the same command will do."""
    complete = [path for path in list_checkpoints(run.checkpoints) if what_is_missing(path) is None]
    if complete:
        return f"run the same command again to resume from {complete[-1].name}"
    return "there is no complete checkpoint, the same command starts from the beginning"


def _read_stage(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8") or None
    except FileNotFoundError:
        return None


def _reported(report: Path) -> int | None:
    """Return the exit code that rank 0 reported; None where it could not, as on a full disk."""
    try:
        return int(report.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _ask_to_stop(run: RunDirectory, number: int, report: Path) -> None:
    """Ask all ranks through the STOP file; where the disk does not take one, each with the signal
    itself.
    """
    try:
        if not run.path.is_dir():
            raise FileNotFoundError(run.path)
        write_text(run.stop_file, "INT" if number == signal.SIGINT else "")
    except OSError:
        for process, environment in _processes_of(report):
            if any(entry.startswith(b"LOCAL_RANK=") for entry in environment):
                os.kill(process, number)


def _kill_all(launcher: int, report: Path) -> None:
    """End the launcher and every rank at once. torch's launcher gives each rank a session of its
    own: they are known by the report file in their environment.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(launcher, signal.SIGKILL)
    for process, _ in _processes_of(report):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def _processes_of(report: Path) -> Iterator[tuple[int, list[bytes]]]:
    mark = f"{EXIT_CODE_FILE}={report}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (environment := (process / "environ").read_bytes().split(b"\0")):
                yield int(process.name), environment
