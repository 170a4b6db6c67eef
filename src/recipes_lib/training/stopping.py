"""Stopping on request without losing a step: signals and a STOP file, one agreement of all ranks,
one checkpoint.

SIGTERM, SIGUSR2 (what a Slurm job forwards before its time limit) and a file `STOP` in the run
directory ask for a checkpoint and exit code 75; SIGINT (Ctrl-C) asks for the same and exit code
130, a second SIGINT ends the process at once. One rank's request is enough: at the end of each
step, and at each batch of a validation, all ranks take the largest request and act on it together.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from recipes_lib.core.errors import ExitCode, Interrupted, Preempted
from recipes_lib.core.ranks import agree_on_largest, rank
from recipes_lib.training.process import STOPPING, exit_status

NOTHING, PREEMPT, INTERRUPT = 0, 1, 2
EXIT_CODES = {PREEMPT: ExitCode.PREEMPTED, INTERRUPT: ExitCode.INTERRUPTED}
STARTING, STEPS, CLOSING = "starting", "steps", "closing"
ANSWERS = {  # to a first Ctrl-C, by stage
    STEPS: STOPPING,
    CLOSING: "all steps are done: the weights are being saved and checked (Ctrl-C again ends it at"
    " once) ...",
}


class EvaluationStopped(Exception):
    """Raised on all ranks at once inside an evaluation that a stop request cuts short."""


class StopRequest:
    """What this process was asked to do; `agreed` is what all ranks decided.

    Before the first step there is nothing to save: a signal ends the process at once, because an
    exception could be lost or disguised in an import. `wait_for_step` begins the time in which a
    request waits for the end of the step, `close` that of saving, which a first signal does not
    stop.

    Args:
        stop_file: asks as a signal does, once it is there.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.requested = self.agreed = NOTHING
        self.stage = STARTING
        self.process = os.getpid()
        self.record: Callable[[int, str], None] = lambda code, error: None

    def wait_for_step(self) -> None:
        """From now on a request is noted and acted on at the end of a step; every rank must call
        this.

        Raises:
            Preempted, Interrupted: the STOP file is there.
        """
        if self.agree() != NOTHING:
            raise _before_first_step(self.agreed)
        self.stage = STEPS

    def close(self) -> None:
        """From now on there is nothing to stop: what remains is to save and check the weights."""
        self.stage = CLOSING

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note what SIGTERM, SIGUSR2 or SIGINT asks for, or end this process."""
        request = INTERRUPT if number == signal.SIGINT else PREEMPT
        if os.getpid() != self.process:
            # A worker that was forked from the training gets signals of its own from a terminal and
            # from Slurm. One that prepares data ends; one that loads data goes on, because the
            # training needs its rows for the step that it finishes.
            if self.stage == STARTING:
                os._exit(EXIT_CODES[request])
            return
        if self.requested == request == INTERRUPT:
            os._exit(ExitCode.INTERRUPTED)
        self.requested = max(self.requested, request)
        answer = ANSWERS.get(self.stage) or str(_before_first_step(request))
        if rank() == 0 and (request == INTERRUPT or self.stage == STARTING):
            os.write(2, f"{answer}\n".encode())  # print may be in the middle of a line
        if self.stage == STARTING:
            code = int(EXIT_CODES[request])
            self.record(code, answer)
            os._exit(exit_status(code, on_every_rank=True))

    def agree(self) -> int:
        """Return the largest request of any rank; every rank must call this at the same point."""
        if self.agreed == NOTHING:
            self.agreed = agree_on_largest(max(self.requested, self._asked_by_file()))
        return self.agreed

    def _asked_by_file(self) -> int:
        """An empty STOP file asks for preemption; one that says INT (`recipes train`) for an
        interrupt.
        """
        try:
            written = self.stop_file.read_bytes().strip() if self.stop_file else None
        except OSError:  # there is none, or the file server is away for a moment
            return NOTHING
        return NOTHING if written is None else INTERRUPT if written == b"INT" else PREEMPT


def _before_first_step(request: int) -> Preempted | Interrupted:
    kind, what = (Interrupted, "interrupted") if request == INTERRUPT else (Preempted, "stopped")
    return kind(f"{what} before the first step: nothing is lost, the same command starts it again")
