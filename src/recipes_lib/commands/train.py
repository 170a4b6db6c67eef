"""`recipes train RECIPE [section.key=value ...]`: start the training script as its `launch` says.

It prints the plain command, runs it, hands signals on, and returns the exit code that the launcher
would lose.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from recipes_lib.commands import Accelerate, Gpus, Nodes, RecipeWord, flag_words
from recipes_lib.config.launch import TRAIN_FLAGS, Launch, place_machine, plan_launch_of
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import ExitCode, print_error
from recipes_lib.core.files import object_or_none, write_text
from recipes_lib.core.lock import is_held
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.terminal import next_step, say
from recipes_lib.plan.cards import devices_here
from recipes_lib.training.stopping import EXIT_CODE_FILE, STOPPING, handling

_POLL_S = 0.1
_LETTING_GO_S = 5.0  # a killed rank takes a moment to let go of the run


def run(
    recipe: RecipeWord,
    overrides: Sequence[str],
    debug: bool,
    typed: Sequence[str],
    *,
    accelerate: Accelerate = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    machine_rank: Annotated[int | None, "of several machines: this one's number, from 0", 0] = None,
    main_process_ip: Annotated[str | None, "of several machines: the address of machine 0"] = None,
    main_process_port: Annotated[int | None, "of several machines: a port of machine 0"] = None,
    dry_run: Annotated[bool, "print the command and do nothing"] = False,
    resume_anyway: Annotated[bool, TRAIN_FLAGS["resume_anyway"]] = False,
    trust_remote_code: Annotated[bool, TRAIN_FLAGS["trust_remote_code"]] = False,
) -> int:
    """Launch, wait, and return the training's own exit code."""
    loaded = load_recipe(recipe, overrides)
    launch = plan_launch_of(loaded, accelerate, gpus, nodes)
    this_command = shlex.join(["recipes", *(word for word in typed if word != "--dry-run")])
    launch = place_machine(launch, machine_rank, main_process_ip, main_process_port, this_command)
    flags = flag_words(
        resume_anyway=resume_anyway, trust_remote_code=trust_remote_code, debug=debug
    )
    command = launch.command(["-m", "recipes_lib.train", recipe, *overrides, *flags])
    if launch.config.use_cpu and launch.world_size == 1 and devices_here():
        # `python -m` alone would take the GPU
        command = ["env", "ACCELERATE_USE_CPU=true", *command]
    say(f"$ {shlex.join(command)}")
    if dry_run:
        for warning in loaded.document.warnings:  # a training says them itself
            print_error(warning)
        return next_step(this_command)
    if launch.rank:
        say(f"machine {launch.rank} of {launch.machines}: the training prints on machine 0")
    code = supervise(command, loaded, launch)
    if code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        next_step(this_command)
    return code


def supervise(command: list[str], recipe: Recipe, launch: Launch) -> int:
    """Run the command in a session of its own and return what the training script reported.

    A first Ctrl-C or SIGTERM asks for a checkpoint through the STOP file: the launcher would kill
    its ranks 30 s after a signal. A second one ends everything at once; so does the first before
    the first step, when there is nothing to save. The ranks end with their launcher
    (`stopping.end_with_launcher`).
    """
    run = RunDirectory(recipe.name)
    earlier = _steps_began(run)
    signals: list[int] = []
    answered, killed = 0, ""
    environment = {**os.environ}
    if launch.config.use_cpu:
        # one process is started without accelerate launch, which would say it
        environment["ACCELERATE_USE_CPU"] = "true"
    with (
        tempfile.TemporaryDirectory() as folder,
        handling(lambda number, frame: signals.append(number)),
    ):
        report = Path(folder) / "exit_code"
        environment[EXIT_CODE_FILE] = str(report)
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        while launcher.poll() is None:
            for number in signals[answered:]:
                answered += 1
                word = "interrupted" if signal.SIGINT in signals else "stopped"
                if signals.count(number) > 1 and number != signal.SIGUSR2:
                    killed = f"{word} at once"
                elif _steps_began(run) in (None, earlier):
                    killed = f"{word} before the first step"
                else:
                    _ask_for_checkpoint(run, number)
            if killed:
                shutil.rmtree(folder)  # a rank that finds it gone does not begin
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
            time.sleep(_POLL_S)
        text = report.read_text(encoding="utf-8") if report.is_file() else ""
        if text.isdecimal():
            return int(text)
        # rank 0 cannot report where the disk is full or it was killed
        code = max(launcher.returncode, 0) or ExitCode.FAILED
        if killed:
            code = ExitCode.INTERRUPTED if signal.SIGINT in signals else ExitCode.PREEMPTED
        if not launch.rank:
            _record_end(run, killed, code)
        return code


def _steps_began(run: RunDirectory) -> str | None:
    """Return when the newest attempt's first step began; None if none has."""
    state = object_or_none(run.state_file) or {}
    return state.get("steps_began") if state.get("state") == "running" else None


def _ask_for_checkpoint(run: RunDirectory, number: int) -> None:
    try:
        write_text(run.stop_file, "INT" if number == signal.SIGINT else "")
        say(STOPPING)
    except OSError as error:
        say(f"no checkpoint can be asked for: {error}; Ctrl-C again ends it at once")


def _record_end(run: RunDirectory, killed: str, code: int) -> None:
    """Record how a training ended that could not do so itself, unless another process holds it."""
    end = time.monotonic() + _LETTING_GO_S
    while is_held(run.path) and time.monotonic() < end:
        time.sleep(_POLL_S)
    what = killed or "the training ended without saying why"
    if run.exists() and run.read_state()["state"] == "running" and not is_held(run.path):
        run.write_state("preempted" if killed else "failed", exit_code=code, error=what)
    elif not killed:
        return
    say(f"{what} (exit {code}); the same command goes on, from a checkpoint if there is one")
