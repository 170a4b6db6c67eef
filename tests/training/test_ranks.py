"""What one rank does for all reaches the others exactly once."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from recipes_lib.training.ranks import on_main_rank


@pytest.fixture
def broadcasts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Rank 0 of a group whose broadcasts are counted."""
    sent: list[object] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda outcome, src: sent.append(list(outcome)))
    return sent


def test_a_call_within_a_call_is_not_broadcast_or_the_other_ranks_take_it_for_the_outer_result(broadcasts: list[object]) -> None:
    assert on_main_rank(lambda: on_main_rank(lambda: "inner") + " and outer") == "inner and outer"
    assert broadcasts == [["inner and outer", None]]


def test_an_error_reaches_every_rank_and_the_next_call_is_broadcast_again(broadcasts: list[object]) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        on_main_rank(fail)
    assert caught.value.on_every_rank  # type: ignore[attr-defined]
    assert on_main_rank(lambda: 1) == 1
    assert len(broadcasts) == 2
