"""How a process of a training ends: what it says, the exit code it reports, and what it leaves for
those who ask later.

Needs no torch: it is imported before anything that may be stopped or may fail.
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
    RecipeError,
    RecipesError,
    explain_fault,
    one_line,
    print_error,
)
from recipes_lib.core.ranks import rank

# where `recipes train` and a cluster job read the exit code, which launchers lose
EXIT_CODE_FILE = "RECIPES_EXIT_CODE_FILE"
# torch's launcher ends rank 0 as soon as another rank has failed: rank 0 has to say why first
RANK_0_FIRST_S = 2.0
_PR_SET_PDEATHSIG = 1
STOPPING = (
    "stopping in a checkpoint after this step or validation batch (Ctrl-C again ends it at once)"
    " ..."
)


def end_with_launcher() -> None:
    """Have the kernel end this rank when its launcher ends: torch starts each rank in a session of
    its own, which outlives a launcher that is killed.
    """
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
    """Say what stopped this process and return its exit status.

    What stops all ranks is said by rank 0 alone: refusals of recipe and data, which every rank
    finds in the same files, and errors of `ranks.of_every_rank`. A defect of one rank is said by
    that rank.

    Args:
        run: the run's folder, for the traceback of a defect.
    """
    note_error(error)
    everywhere = getattr(error, "on_every_rank", False)
    message = error if isinstance(error, RecipesError) else explain_fault(error)
    speaks = rank() == 0 or not (everywhere or message is error)
    if message is error:
        alone = "WORLD_SIZE" not in os.environ
        everywhere = everywhere or alone or isinstance(error, RecipeError | DataError)
    message = message or as_message(error, run)
    if speaks:
        print_error(message)
    return exit_status(int(message.exit_code), on_every_rank=everywhere)


def as_message(error: Exception, run: Path | None) -> RecipesError:
    """Return a defect as one message, its traceback in the run's folder: a rerun with --debug may
    take days.
    """
    where = "--debug shows where"
    if run is not None and run.is_dir():
        file = run / (f"traceback-rank{rank()}.txt" if "RANK" in os.environ else "traceback.txt")
        with suppress(OSError):
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            where = f"the traceback is in {file}"
    what = f"internal error: {type(error).__name__}: {one_line(error)}"
    return RecipesError(what, f"this is a bug; {where}")


def note_error(error: BaseException) -> None:
    """Leave what stopped this rank, named by its time, in the folder RECIPES_RANK_ERRORS where a
    cluster job asks for it.

    The launcher ends the other ranks, and what they say then hides the cause.
    """
    folder = os.environ.get("RECIPES_RANK_ERRORS")
    if folder and getattr(error, "exit_code", 1) not in (75, 130):
        text = (
            f"rank {rank()} on {socket.gethostname()}:"
            f" {error if str(error) else type(error).__name__}\n"
        )
        with suppress(OSError):
            Path(folder, f"{time.time_ns()}-rank{rank()}.txt").write_text(
                text, encoding="utf-8", errors="backslashreplace"
            )


def exit_status(code: int, on_every_rank: bool) -> int:
    """Hand the exit code to `recipes train`: the launcher turns every code into 1 and adds a
    traceback.

    Where every rank ends for the same reason the launcher is told 0, so that it stays silent;
    without `recipes train` the others end a little later than rank 0, which says the reason.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file is None:
        if code and on_every_rank and rank():
            time.sleep(RANK_0_FIRST_S)
        return code
    if os.environ.get("LOCAL_RANK", "0") == "0":  # each machine has a `recipes train` of its own
        try:
            Path(file).write_text(str(code), encoding="utf-8")
        except OSError:  # a full disk: the launcher's 1 is better than 0
            return code
    return 0 if on_every_rank else code


def end_process(code: int) -> NoReturn:
    """End this process; one of several ranks without taking the process group apart."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()  # trackers send their last lines there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
