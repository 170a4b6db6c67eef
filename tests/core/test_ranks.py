"""What one rank does for all reaches the others exactly once, however long it takes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from recipes_lib.core.errors import ExitCode, RecipeError, RecipeErrors
from recipes_lib.core.ranks import on_main_rank


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What rank 0 of a group hands to the others."""
    handed: list[Any] = []

    class Store:
        def set(self, key: str, value: bytes) -> None:
            handed.append(pickle.loads(value))

        def add(self, key: str, amount: int) -> int:
            return 1  # the other rank has read it

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", Store)
    return handed


def test_a_call_within_a_call_is_not_sent_or_the_other_ranks_take_it_for_the_outer_result(
    sent: list[Any],
) -> None:
    assert on_main_rank(lambda: on_main_rank(lambda: "inner") + " and outer") == "inner and outer"
    assert sent == [("inner and outer", None)]


def test_an_error_reaches_every_rank_and_the_next_call_is_sent_again(sent: list[Any]) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        on_main_rank(fail)
    assert caught.value.on_every_rank  # type: ignore[attr-defined]
    assert on_main_rank(lambda: 1) == 1
    assert [type(error) for _, error in sent] == [ValueError, type(None)]


def test_an_error_that_cannot_be_made_again_on_another_rank_reaches_it_as_text(
    sent: list[Any],
) -> None:
    class Stubborn(Exception):
        def __init__(self, message: str, *, response: object) -> None:
            super().__init__(message)

    def fail() -> None:
        raise Stubborn("the Hub said no", response=object())

    with pytest.raises(Stubborn):
        on_main_rank(fail)
    assert str(sent[0][1]) == "Stubborn: the Hub said no"


def test_several_errors_of_a_recipe_reach_every_rank_with_their_places_and_their_code(
    sent: list[Any],
) -> None:
    errors = [RecipeError(f"wrong {key}", "a hint", file="r.yaml", line=key) for key in (2, 1)]

    def fail() -> None:
        raise RecipeErrors(errors)

    with pytest.raises(RecipeErrors) as caught:
        on_main_rank(fail)
    assert str(sent[0][1]) == str(caught.value) and "r.yaml:1: wrong 1" in str(sent[0][1])
    assert sent[0][1].exit_code == ExitCode.USAGE and sent[0][1].on_every_rank


@pytest.mark.slow
def test_ranks_wait_for_rank_0_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    """Two processes whose collectives end after 2 s: what rank 0 does for 6 s, and the files it
    writes for 6 s, end nothing.
    """
    script = tmp_path / "patient.py"
    script.write_text(
        textwrap.dedent("""
            import datetime, time
            import torch.distributed as dist
            from recipes_lib.training.process import end_process
            from recipes_lib.core.ranks import meet, on_main_rank

            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))

            def slow():
                time.sleep(6)
                return "checked"

            assert on_main_rank(slow) == "checked"
            if dist.get_rank() == 0:
                time.sleep(6)
            meet()
            try:
                on_main_rank(lambda: 1 / 0)
            except ZeroDivisionError as error:
                print(f"rank {dist.get_rank()} knows:", error, error.on_every_rank, flush=True)
            end_process(0)
        """),
        encoding="utf-8",
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {f"rank {number} knows: division by zero True" for number in (0, 1)} <= set(
        done.stdout.splitlines()
    )
