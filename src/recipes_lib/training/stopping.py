"""How a process of a training ends: asked to stop, with an error or at its end. Needs no torch.

SIGTERM, SIGUSR2 (of a Slurm job before its time limit) and a file `STOP` in the run directory ask
for a checkpoint, and so does SIGINT. After each step all ranks act on the largest request.
"""

import atexit
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from recipes_lib.core import errors
from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.ranks import (
    AnotherRankFailed,
    agree_on_largest,
    num_failed,
    rank,
    shared_store,
    world_size,
)

NOTHING, PREEMPT, INTERRUPT = 0, 1, 2
EXIT_CODES = {PREEMPT: ExitCode.PREEMPTED, INTERRUPT: ExitCode.INTERRUPTED}
STOPPING = "stopping once a checkpoint or the weights are saved (Ctrl-C again ends at once) ..."
EXIT_CODE_FILE = "RECIPES_EXIT_CODE_FILE"
ALL_FAIL_WITHIN_S = 2.0
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """What this process was asked to do, by a signal or a file; `agreed` is what all ranks decided.
    Before the first step there is nothing to save: a signal ends the process at once.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file  # known from the attempt on, when the ranks have met
        self.requested = NOTHING
        self.agreed = NOTHING
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
        if not self.steps_began and world_size() > 1 and self.stop_file and _failures(0):
            os._exit(ExitCode.FAILED)  # a rank failed and has said why: the launcher ends all
        answer = STOPPING if self.steps_began else str(_before_first_step(request))
        if rank() == 0 and (request == INTERRUPT or not self.steps_began):
            os.write(2, f"{answer}\n".encode())  # print may be in the middle of a line
        if not self.steps_began:
            self.record(int(EXIT_CODES[request]), answer)
            os._exit(exit_status(int(EXIT_CODES[request]), on_every_rank=True))

    def agree(self) -> int:
        """Return the largest request of any rank; every rank has to call at the same point."""
        if self.agreed == NOTHING:
            self.agreed = agree_on_largest(max(self.requested, self._asked_by_file()))
        return self.agreed

    def _asked_by_file(self) -> int:
        """An empty STOP file asks for preemption; `recipes train` writes INT for an interrupt."""
        if self.stop_file is not None:
            with suppress(OSError):  # there is none, or the file server is away for a moment
                is_interrupt = self.stop_file.read_bytes().strip() == b"INT"
                return INTERRUPT if is_interrupt else PREEMPT
        return NOTHING


def _before_first_step(request: int) -> RecipesError:
    what = "interrupted" if request == INTERRUPT else "stopped"
    error = RecipesError(f"{what} before the first step: the same command starts it again")
    error.exit_code = EXIT_CODES[request]
    return error


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
    """Say once for all ranks what stopped this process, and return its exit status.

    Rank 0 says what `on_main_rank` raised; any other error the rank that failed first: those after
    it have the same one, or have lost their connection to it.
    """
    message = error if isinstance(error, RecipesError) else errors.explain_fault(error)
    if message is None:
        message = _as_defect(error, run)
    says_it = _failures(1) == 1
    if getattr(error, "on_every_rank", False):
        says_it = rank() == 0
    if says_it:
        errors.print_error(message)
    deadline = time.monotonic() + ALL_FAIL_WITHIN_S
    num_ended = _failures(0)
    while num_ended < world_size() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        num_ended = _failures(0)
    all_ended = num_ended == world_size()
    if isinstance(error, AnotherRankFailed):  # whose exit code it is, too
        if all_ended and EXIT_CODE_FILE in os.environ:
            return 0
        return int(ExitCode.FAILED)
    return exit_status(int(message.exit_code), on_every_rank=all_ended)


def _failures(more: int) -> int:
    """Return how many ranks have failed, after `more` were added."""
    with suppress(Exception):
        if shared_store() is not None:
            return num_failed(more)
    # alone, or the store has ended with rank 0
    return rank() + 1 if more else world_size()


def _as_defect(error: Exception, run: Path | None) -> RecipesError:
    """Keep the traceback of a defect in the run's folder."""
    where = "--debug shows where"
    if run is not None and run.is_dir():
        with suppress(OSError):
            file = run / "traceback.txt"
            if rank():
                file = run / f"traceback-{rank()}.txt"
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            where = f"the traceback is in {file}"
    what = f"internal error: {type(error).__name__}: {errors.one_line(error)}"
    return RecipesError(what, f"this is a bug; {where}")


def exit_status(code: int, on_every_rank: bool) -> int:
    """Hand the exit code to `recipes train`, and return what the launcher is told: 0 where every
    rank ends for one reason, because it turns each code into 1 and adds a traceback.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file is None:
        return code
    try:
        with Path(file).open("x", encoding="utf-8") as report:
            report.write(str(code))
    except FileExistsError:  # another rank was first
        pass
    except OSError:  # a full disk: the launcher's 1 is better than 0
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
