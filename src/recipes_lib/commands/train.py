"""`recipes train`: run the plain command, hand signals on, return the training's exit code."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from recipes_lib.commands import Accelerate, Gpus, Nodes, RecipeWord, flag_words
from recipes_lib.commands.check import refuse_faults
from recipes_lib.config.launch import TRAIN_FLAGS, Launch, place_machine, plan_launch
from recipes_lib.config.recipe import Recipe, check_launch, load_recipe
from recipes_lib.core.environment import require_extra
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.files import object_or_none
from recipes_lib.core.run_directory import RunDirectory, is_held
from recipes_lib.core.terminal import next_step, say
from recipes_lib.training.finished import finished_line
from recipes_lib.training.stopping import EXIT_CODE_FILE, STOPPING, handling

_POLL_S = 0.1
_LETTING_GO_S = 5.0  # a killed rank takes a moment to let go of the run


def run_train(
    recipe: RecipeWord,
    overrides: Sequence[str],
    debug: bool,
    typed: Sequence[str],
    *,
    accelerate: Accelerate = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    machine_rank: Annotated[int | None, "several machines: this one's number, from 0", 0] = None,
    main_process_ip: Annotated[str | None, "several machines: address of machine 0"] = None,
    main_process_port: Annotated[int | None, "several machines: port of machine 0"] = None,
    dry_run: Annotated[bool, "only print the command"] = False,
    resume_anyway: Annotated[bool, TRAIN_FLAGS["resume_anyway"]] = False,
    trust_remote_code: Annotated[bool, TRAIN_FLAGS["trust_remote_code"]] = False,
) -> int:
    """Launch, wait, and return the training's own exit code."""
    loaded = load_recipe(recipe, overrides)
    launch = plan_launch(loaded.launch, accelerate, gpus, nodes)
    launch = place_machine(launch, machine_rank, main_process_ip, main_process_port)
    again = [word for word in typed if word != "--dry-run"]
    flags = flag_words(
        resume_anyway=resume_anyway, trust_remote_code=trust_remote_code, debug=debug
    )
    command = launch.command(["-m", "recipes_lib.train", recipe, *overrides, *flags])
    if not dry_run:
        require_extra("train")
        line = finished_line(RunDirectory(loaded.name), loaded)
        if line is not None:
            say(line)
            return next_step("chat", loaded.name)
        check_launch(loaded, launch)
        refuse_faults(loaded)
    if dry_run or debug:
        say(f"$ {shlex.join(command)}")
    if dry_run:
        return next_step(*again)
    if launch.rank:
        say(f"machine {launch.rank} of {launch.machines}: the training prints on machine 0")
    code = supervise(command, loaded, launch)
    if code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        next_step(*again)
    return code


def supervise(command: list[str], recipe: Recipe, launch: Launch) -> int:
    """Run the command in a session of its own and return what the training script reported.

    A first Ctrl-C or SIGTERM asks for a checkpoint through the STOP file: the launcher would kill
    its ranks 30 s after a signal. A second one ends everything at once; so does the first before
    the first step.
    """
    run = RunDirectory(recipe.name)
    earlier_steps_began = _steps_began(run)
    signals: list[int] = []  # as they arrive
    num_answered = 0  # of the signals
    killed = ""  # how we ended the training at once, if we did
    with (
        tempfile.TemporaryDirectory() as folder,
        handling(lambda number, frame: signals.append(number)),
    ):
        report = Path(folder) / "exit_code"
        environment = {**os.environ, EXIT_CODE_FILE: str(report)}
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        while launcher.poll() is None:
            for number in signals[num_answered:]:
                num_answered += 1
                word = "interrupted" if signal.SIGINT in signals else "stopped"
                # Slurm may send its warning, SIGUSR2, more than once
                is_repeated = signals.count(number) > 1 and number != signal.SIGUSR2
                if is_repeated:
                    killed = f"{word} at once"
                elif _steps_began(run) in (None, earlier_steps_began):
                    killed = f"{word} before the first step"
                else:
                    say(STOPPING)
                    with suppress(OSError):  # on a full disk only a second signal helps
                        run.stop_file.write_text("INT" if number == signal.SIGINT else "")
            if killed:
                shutil.rmtree(folder)  # a rank that finds it gone does not begin
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
            time.sleep(_POLL_S)

        text = report.read_text("utf-8") if report.is_file() else ""
        if text.isdecimal():
            return int(text)
        # rank 0 could not report: it was killed, or the disk is full
        if killed and signal.SIGINT in signals:
            code = int(ExitCode.INTERRUPTED)
        elif killed:
            code = int(ExitCode.PREEMPTED)
        else:
            code = max(launcher.returncode, 0) or int(ExitCode.FAILED)
        if not launch.rank:
            why = "ended without saying why"
            if launcher.returncode == -signal.SIGKILL:
                why = "was killed (out of memory?)"
            _record_end(run, killed, f"the training {why}", code)
        return code


def _steps_began(run: RunDirectory) -> str | None:
    """Return when the newest attempt's first step began; None if none has."""
    state = object_or_none(run.state_file) or {}
    if state.get("state") != "running":
        return None
    return state.get("steps_began")


def _record_end(run: RunDirectory, killed: str, ended: str, code: int) -> None:
    """Record how a training ended that could not do so itself, unless another process holds it."""
    deadline = time.monotonic() + _LETTING_GO_S
    while is_held(run.path) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    what = killed or ended
    if run.exists() and run.read_state()["state"] == "running" and not is_held(run.path):
        run.write_state("stopped" if killed else "failed", exit_code=code, error=what)
    elif not killed:
        return
    say(f"{what} (exit {code}); the same command resumes, from a checkpoint if there is one")
