from __future__ import annotations

import errno

import pytest

from recipes_lib.errors import ExitCode, Preempted
from recipes_lib.training.session import explain_fault, stop_behind


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


@pytest.mark.parametrize(
    ("number", "what", "remedy"),
    [
        (errno.ENOSPC, "cannot write to the disk: reason (/a/file)", "free some space and run"),
        (errno.EROFS, "cannot write to the disk: reason (/a/file)", "make it writable again and run"),
        (errno.EACCES, "cannot read or write: reason (/a/file)", "make it accessible again and run"),
        (errno.ESTALE, "cannot read or write: reason (/a/file)", "make it accessible again and run"),
    ],
    ids=["full", "read-only", "not allowed", "stale"],
)
def test_a_disk_that_refuses_is_called_a_write_only_where_it_was_one(number: int, what: str, remedy: str) -> None:
    fault = explain_fault(OSError(number, "reason", "/a/file"))
    assert fault is not None and fault.exit_code == ExitCode.ENVIRONMENT
    assert what in str(fault) and remedy in str(fault)
