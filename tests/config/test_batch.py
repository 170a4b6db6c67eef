from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes_lib.config.batch import solve_batch
from recipes_lib.core.errors import RecipeError

SIZES = st.integers(min_value=1, max_value=64)


def test_accumulation_fills_the_batch():
    assert solve_batch(64, per_device=4, world_size=2) == 8
    assert solve_batch(8, per_device=8, world_size=1) == 1


@pytest.mark.parametrize(
    ("batch", "per_device", "world_size", "words"),
    [
        (
            64,
            5,
            1,
            ["64 / (5 per device x 1 processes = 5) = 12.8", "run.global_batch_size 60 or 65", "4"],
        ),
        (
            8,
            8,
            2,
            [
                "8 / (8 per device x 2 processes = 16) = 0.5",
                "train.per_device_train_batch_size 1, 2, 4",
                "run.global_batch_size 16",
            ],
        ),
        (7, 2, 3, ["run.global_batch_size 6 or 12"]),
    ],
)
def test_a_batch_that_does_not_divide_shows_arithmetic_and_legal_values(
    batch, per_device, world_size, words
):
    with pytest.raises(RecipeError) as caught:
        solve_batch(batch, per_device, world_size)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@given(batch=st.integers(min_value=1, max_value=512), per_device=SIZES, world_size=SIZES)
def test_the_solution_is_exact_or_refused(batch, per_device, world_size):
    try:
        assert solve_batch(batch, per_device, world_size) * per_device * world_size == batch
    except RecipeError:
        assert batch % (per_device * world_size)
