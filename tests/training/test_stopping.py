"""A signal is never lost, and a data worker leaves it to the training."""

import contextlib
import os
import signal
import time

import pytest

from recipes_lib.core.errors import RecipesError
from recipes_lib.training.stopping import INTERRUPT, NOTHING, StopRequest, handling


def test_a_signal_before_the_first_step_ends_the_process_with_one_line_and_a_record(
    tmp_path, capfd
) -> None:
    training = os.fork()
    if not training:
        stop = StopRequest(tmp_path / "STOP")
        stop.record = lambda code, error: (tmp_path / "run").write_text(f"{code} {error}") and None
        with handling(stop.on_signal):
            with contextlib.suppress(BaseException):  # as a library does while it imports another
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(training, 0)[1]) == 130
    said = "interrupted before the first step: the same command"
    assert said in capfd.readouterr().err and said in (tmp_path / "run").read_text()


def test_a_worker_that_was_forked_from_the_training_neither_ends_nor_speaks(
    tmp_path, capfd
) -> None:
    stop = StopRequest(tmp_path / "STOP")
    with handling(stop.on_signal):
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


def test_a_stop_file_is_seen_before_the_first_step(tmp_path) -> None:
    stop = StopRequest(tmp_path / "STOP")
    with handling(stop.on_signal):
        (tmp_path / "STOP").write_text("INT")
        with pytest.raises(RecipesError, match="before the first step"):
            stop.wait_for_step()
