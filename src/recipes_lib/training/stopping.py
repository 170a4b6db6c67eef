"""Stopping on request without losing a step: signals and a STOP file, one agreement of all ranks,
one checkpoint.

SIGTERM, SIGUSR2 (what a Slurm job forwards before its time limit) and a file `STOP` in the run
directory ask for a checkpoint and exit code 75; SIGINT (Ctrl-C) asks for the same and exit code
130, a second SIGINT ends the process at once. One rank's request is enough: at the end of each
step, and at each batch of a validation, all ranks take the largest request and act on it together.
After the last step only a validation can be cut short: the run's last checkpoint says that it is
still due.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from recipes_lib.core.errors import ExitCode
from recipes_lib.core.ranks import agree_on_largest, rank
from recipes_lib.training.process import STOPPING, before_first_step, handling

NOTHING, PREEMPT, INTERRUPT = 0, 1, 2
EXIT_CODES = {PREEMPT: ExitCode.PREEMPTED, INTERRUPT: ExitCode.INTERRUPTED}
STEPS, CLOSING = "steps", "closing"
ANSWERS = {  # to a first Ctrl-C, by stage
    STEPS: STOPPING,
    CLOSING: (
        "all steps are done: the weights are being saved and checked (Ctrl-C again ends it at"
        " once) ..."
    ),
}


class EvaluationStopped(Exception):
    """Raised on all ranks at once inside an evaluation that a stop request cuts short."""


class StopRequest:
    """What this process was asked to do; `agreed` is what all ranks decided.

    Before the first step a signal ends the process at once. `wait_for_step` begins the time in
    which it waits for the end of the step, `close` that of saving, which a first signal does not
    stop.
    """

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self.requested = NOTHING
        self.agreed = NOTHING
        self.stage = ""
        self.process = os.getpid()

    def wait_for_step(self) -> None:
        """From now on a request is noted and acted on at the end of a step; every rank must call
        this.

        Raises:
            Preempted, Interrupted: the STOP file is there, or a signal came before and what it
                raised was lost inside a library.
        """
        if self.agree() != NOTHING:
            raise before_first_step(self.agreed == INTERRUPT)
        self.stage = STEPS

    def close(self) -> None:
        """From now on there is nothing to stop: what remains is to save and check the weights."""
        self.stage = CLOSING

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGTERM, SIGUSR2 and SIGINT until the block ends."""
        with handling(self._on_signal):
            yield self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        request = INTERRUPT if number == signal.SIGINT else PREEMPT
        if os.getpid() != self.process:
            # A worker that was forked from the training gets signals of its own from a terminal and
            # from Slurm. One that prepares data ends; one that loads data goes on, because the
            # training needs its rows for the step that it finishes.
            if not self.stage:
                os._exit(EXIT_CODES[request])
            return
        if self.requested == request == INTERRUPT:
            os._exit(ExitCode.INTERRUPTED)
        self.requested = max(self.requested, request)
        if not self.stage:
            raise before_first_step(request == INTERRUPT)
        if request == INTERRUPT and rank() == 0:
            os.write(2, f"{ANSWERS[self.stage]}\n".encode())  # print may be in the middle of a line

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
            return INTERRUPT if self.stop_file.read_bytes().strip() == b"INT" else PREEMPT
        except OSError:
            # there is none, or the file server is away for a moment: asked again after the next
            # step
            return NOTHING
