"""A signal is never lost, and a data worker leaves it to the training."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from recipes_lib.core.errors import Interrupted
from recipes_lib.training.stopping import INTERRUPT, NOTHING, StopRequest


def test_a_signal_whose_exception_a_library_swallows_stops_the_run_before_its_first_step(
    tmp_path: Path,
) -> None:
    with StopRequest(tmp_path / "STOP").listening() as stop:
        with contextlib.suppress(Exception):  # as `try: import x; except Exception: x = None` does
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="interrupted before the first step: nothing is lost"):
            stop.wait_for_step()


def test_after_the_last_step_a_signal_is_answered_and_stops_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequest(tmp_path / "STOP").listening() as stop:
        stop.wait_for_step()
        stop.close()
        os.kill(os.getpid(), signal.SIGINT)
    assert (
        capfd.readouterr().err
        == "all steps are done: the weights are being saved and checked (Ctrl-C again ends it at"
        " once) ...\n"
    )


def test_a_worker_that_was_forked_from_the_training_neither_ends_nor_speaks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequest(tmp_path / "STOP").listening() as stop:
        stop.wait_for_step()
        worker = os.fork()
        if not worker:
            for _ in range(2):  # a second Ctrl-C would end the training at once
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            os._exit(0 if stop.requested == NOTHING else 1)
        assert os.waitpid(worker, 0)[1] == 0
        assert stop.requested == NOTHING != INTERRUPT
    assert capfd.readouterr().err == ""


def test_a_stop_file_is_seen_before_the_first_step(tmp_path: Path) -> None:
    with StopRequest(tmp_path / "STOP").listening() as stop:
        (tmp_path / "STOP").write_text("INT")
        with pytest.raises(Interrupted, match="before the first step"):
            stop.wait_for_step()
