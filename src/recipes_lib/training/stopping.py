"""Stopping on request without losing a step: signals and a STOP file, one agreement of all ranks, one checkpoint.

SIGTERM, SIGUSR2 (what a Slurm job forwards before its time limit) and a file `STOP` in the run directory ask for a checkpoint
and exit code 75; SIGINT (Ctrl-C) asks for the same and exit code 130, a second SIGINT ends the process at once. One rank's
request is enough: at the end of each step all ranks take the largest request and act on it together.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes_lib.errors import ExitCode, Interrupted, Preempted
from recipes_lib.training.ranks import agree_on_largest

NOTHING, PREEMPT, INTERRUPT = 0, 1, 2
EXIT_CODES = {PREEMPT: ExitCode.PREEMPTED, INTERRUPT: ExitCode.INTERRUPTED}


class EvaluationStopped(Exception):
    """Raised on all ranks at once inside an evaluation that a stop request cuts short."""


class StopRequest:
    """What this process was asked to do, set by signal handlers; `agreed` is what all ranks decided.

    Before the first step there is nothing to save, so a signal ends the process at once; `wait_for_step` begins the time in which
    a signal waits for the end of the step.
    """

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self.requested = NOTHING
        self.agreed = NOTHING
        self.waits_for_step = False

    def wait_for_step(self) -> None:
        """From now on a request is noted and acted on at the end of a step."""
        self.waits_for_step = True

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGTERM, SIGUSR2 and SIGINT until the block ends."""
        handlers = {signal.SIGTERM: self._on_preempt, signal.SIGUSR2: self._on_preempt, signal.SIGINT: self._on_interrupt}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_preempt(self, number: int, frame: FrameType | None) -> None:
        if not self.waits_for_step:
            raise Preempted("stopped before the first step; nothing is lost", "the same command starts it again")
        self.requested = max(self.requested, PREEMPT)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self.waits_for_step:
            raise Interrupted("interrupted before the first step; nothing is lost", "the same command starts it again")
        if self.requested == INTERRUPT:
            os._exit(ExitCode.INTERRUPTED)
        self.requested = INTERRUPT

    def agree(self) -> int:
        """Return what all ranks do: the largest request of any rank. Every rank must call this at the same point."""
        if self.agreed == NOTHING:
            self.agreed = agree_on_largest(max(self.requested, self._asked_by_file()))
        return self.agreed

    def _asked_by_file(self) -> int:
        """An empty STOP file asks for preemption; one that says INT (written by `recipes train` on Ctrl-C) for an interrupt."""
        try:
            return INTERRUPT if self.stop_file.read_text().strip() == "INT" else PREEMPT
        except FileNotFoundError:
            return NOTHING


class StopCallback(TrainerCallback):
    """Turns an agreed request into a checkpoint and the end of the loop.

    A due evaluation is put off (`evaluation_pending`): the resumed run makes it up, so that the metrics of an interrupted run
    are those of an uninterrupted one.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.evaluation_pending = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Agree with the other ranks; on a request, save now and stop."""
        planned_end = state.global_step >= state.max_steps
        if not planned_end and self.request.agree() != NOTHING:
            self.evaluation_pending = control.should_evaluate
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """A request that arrived during a save needs no second checkpoint."""
        if state.global_step < state.max_steps and self.request.agree() != NOTHING:
            control.should_training_stop = True
        return control

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A request during an evaluation cuts it short."""
        if state.global_step < state.max_steps and self.request.agree() != NOTHING:
            raise EvaluationStopped
