from __future__ import annotations

from recipes_lib.core.errors import Preempted
from recipes_lib.training.attempt import stop_behind


def test_a_stop_request_that_a_library_turned_into_its_own_error_is_found() -> None:
    try:
        try:
            raise Preempted("stopped before the first step")
        except Preempted as stop:
            raise RuntimeError("Failed to import trl.trainer.sft_trainer") from stop
    except RuntimeError as error:
        found = stop_behind(error)
    assert found is not None and found.exit_code == 75


def test_another_error_hides_no_stop_request() -> None:
    assert stop_behind(ValueError("no")) is None
