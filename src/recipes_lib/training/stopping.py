"""How a process of a training ends: asked to stop, with an error or at its end. Needs no torch.

SIGTERM, SIGUSR2 (of a Slurm job before its time limit) and a file `STOP` in the run directory ask
for a checkpoint and exit code 75; SIGINT (Ctrl-C) asks for the same and exit code 130, a second one
ends the process at once. After each step, and each batch of a validation, all ranks act on the
largest request.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from recipes_lib.core.errors import (
    DataError,
    ExitCode,
    Interrupted,
    Preempted,
    RecipeError,
    RecipesError,
    explain_fault,
    one_line,
    print_error,
)
from recipes_lib.core.ranks import agree_on_largest, rank, shared_store, world_size

NOTHING, PREEMPT, INTERRUPT = 0, 1, 2
EXIT_CODES = {PREEMPT: ExitCode.PREEMPTED, INTERRUPT: ExitCode.INTERRUPTED}
STOPPING = (
    "stopping in a checkpoint after this step or validation batch, or once the weights are saved"
    " (Ctrl-C again ends it at once) ..."
)
# where `recipes train` and a cluster job read the exit code
EXIT_CODE_FILE = "RECIPES_EXIT_CODE_FILE"
# torch's launcher ends rank 0 as soon as another rank has failed: rank 0 has to say why first
RANK_0_FIRST_S = 2.0
_PR_SET_PDEATHSIG = 1


class EvaluationStopped(Exception):
    """Raised on all ranks at once inside an evaluation that a stop request cuts short."""


class StopRequest:
    """What this process was asked to do, by a signal or a file; `agreed` is what all ranks decided.

    Before the first step there is nothing to save: a signal ends the process at once. An exception
    could be lost in an import.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.requested = self.agreed = NOTHING
        self.steps_began = False
        self.process = os.getpid()
        self.record: Callable[[int, str], None] = lambda code, error: None

    def wait_for_step(self) -> None:
        """From now on a request is acted on at the end of a step; every rank has to call."""
        if self.agree() != NOTHING:
            raise _before_first_step(self.agreed)
        self.steps_began = True

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note what SIGTERM, SIGUSR2 or SIGINT asks for, or end this process."""
        request = INTERRUPT if number == signal.SIGINT else PREEMPT
        if os.getpid() != self.process:
            # A forked worker gets the signals of a terminal and of Slurm too. One that prepares
            # data ends; one that loads data goes on: the last step needs its rows.
            if not self.steps_began:
                os._exit(EXIT_CODES[request])
            return
        if self.requested == request == INTERRUPT:
            os._exit(ExitCode.INTERRUPTED)
        self.requested = max(self.requested, request)
        answer = STOPPING if self.steps_began else str(_before_first_step(request))
        if rank() == 0 and (request == INTERRUPT or not self.steps_began):
            os.write(2, f"{answer}\n".encode())  # print may be in the middle of a line
        if not self.steps_began:
            code = int(EXIT_CODES[request])
            self.record(code, answer)
            os._exit(exit_status(code, on_every_rank=True))

    def agree(self) -> int:
        """Return the largest request of any rank; every rank has to call at the same point."""
        if self.agreed == NOTHING:
            self.agreed = agree_on_largest(max(self.requested, self._asked_by_file()))
        return self.agreed

    def _asked_by_file(self) -> int:
        """An empty STOP file asks for preemption; `recipes train` writes INT for an interrupt."""
        try:
            written = self.stop_file.read_bytes().strip() if self.stop_file else None
        except OSError:  # there is none, or the file server is away for a moment
            return NOTHING
        return NOTHING if written is None else INTERRUPT if written == b"INT" else PREEMPT


def _before_first_step(request: int) -> Preempted | Interrupted:
    kind, what = (Interrupted, "interrupted") if request == INTERRUPT else (Preempted, "stopped")
    return kind(f"{what} before the first step: nothing is lost, the same command starts it again")


def end_with_launcher() -> None:
    """Have the kernel end this rank with its launcher: torch gives each rank its own session."""
    if "LOCAL_RANK" not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    file = os.environ.get(EXIT_CODE_FILE)
    if file is not None and not Path(file).parent.is_dir():  # ended before the line above
        os._exit(1)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM, SIGUSR2 and SIGINT until the block ends."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def report(error: Exception, run: Path | None) -> int:
    """Say what stopped this process, and return its exit status. Rank 0 says what all ranks have;
    else the rank that failed first speaks: the others have lost their connection to it.
    """
    _note_for_job(error)
    message = error if isinstance(error, RecipesError) else explain_fault(error)
    message = message or _as_defect(error, run)
    alike = world_size() == 1 or getattr(error, "on_every_rank", False)
    alike = alike or isinstance(error, RecipeError | DataError)  # all ranks read the same files
    speaks = rank() == 0 if alike else _fails_first()
    if speaks:
        print_error(message)
    elif not alike:  # a consequence: the rank that failed first reports the cause
        return int(message.exit_code)
    return exit_status(int(message.exit_code), on_every_rank=alike)


def _fails_first() -> bool:
    with suppress(Exception):
        store = shared_store()
        return store is None or store.add("recipes/failed", 1) == 1
    return rank() == 0  # the store has ended with it


def _as_defect(error: Exception, run: Path | None) -> RecipesError:
    """Keep the traceback of a defect in the run's folder: to come to it again may take days."""
    where = "--debug shows where"
    if run is not None and run.is_dir():
        file = run / (f"traceback-rank{rank()}.txt" if world_size() > 1 else "traceback.txt")
        with suppress(OSError):
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            where = f"the traceback is in {file}"
    what = f"internal error: {type(error).__name__}: {one_line(error)}"
    return RecipesError(what, f"this is a bug; {where}")


def _note_for_job(error: Exception) -> None:
    """Leave the cause, by its time, where a job looks: what ranks say that are ended hides it."""
    folder = os.environ.get("RECIPES_RANK_ERRORS")
    if folder and not isinstance(error, Preempted | Interrupted):
        text = f"rank {rank()} on {socket.gethostname()}: {str(error) or type(error).__name__}\n"
        with suppress(OSError):
            file = Path(folder, f"{time.time_ns()}-rank{rank()}.txt")
            file.write_text(text, encoding="utf-8", errors="backslashreplace")


def exit_status(code: int, on_every_rank: bool) -> int:
    """Hand the exit code to `recipes train`, and return what the launcher is told: 0 where every
    rank ends for one reason, because it turns each code into 1 and adds a traceback.

    Without `recipes train` the other ranks end a little later than rank 0, which says the reason.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file is None:
        if code and on_every_rank and rank():
            time.sleep(RANK_0_FIRST_S)
        return code
    # each machine has a `recipes train` of its own, and a rank that fails alone may end rank 0
    if os.environ.get("LOCAL_RANK", "0") == "0" or not on_every_rank:
        try:
            with Path(file).open("x", encoding="utf-8") as report:
                report.write(str(code))
        except OSError:  # another rank was first; or a full disk: the launcher's 1 is better than 0
            return code
    return 0 if on_every_rank else code


def end_process(code: int) -> NoReturn:
    """End this process; of several ranks, without taking the process group apart."""
    if world_size() > 1:
        atexit._run_exitfuncs()  # trackers send their last lines there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
