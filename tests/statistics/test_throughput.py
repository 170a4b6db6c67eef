"""Whether one training is faster than another: what the test promises, on simulated step times."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from recipes_lib.statistics import throughput
from recipes_lib.statistics.throughput import FEWEST_STEPS, StepTimes, compare_rates

STUDIES = 400
ABOVE = 2 * math.sqrt(0.05 * 0.95 / STUDIES)


def training(
    rng: np.random.Generator, steps: int, alike: float, faster: float = 1.0, spread: float = 0.0
) -> StepTimes:
    """Steps whose time follows their tokens, with a drift that neighbours share and rare spikes.

    Args:
        alike: correlation of the drift of neighbours.
        spread: standard deviation of the logarithm of whole trainings' speeds.
    """
    tokens = rng.lognormal(6, 0.2, steps)
    drift = lfilter([math.sqrt(1 - alike**2)], [1, -alike], rng.normal(size=steps + 100))[100:]
    seconds = (0.3 + tokens / 600) * np.exp(0.1 * drift)
    seconds *= 1 + (rng.random(steps) < 0.01) * rng.exponential(1, steps)
    return StepTimes(tokens, seconds / faster * math.exp(spread * rng.normal()))


@pytest.mark.parametrize(
    ("steps", "alike", "seeds", "spread"),
    [
        (80, 0.0, 1, 0.0),
        (150, 0.5, 1, 0.0),
        (500, 0.3, 1, 0.0),
        (500, 0.85, 1, 0.0),
        (150, 0.5, 3, 0.02),
        (150, 0.5, 5, 0.1),
    ],
)
def test_equal_speeds_are_called_different_in_one_of_twenty_at_most_and_a_tenth_is_found(
    monkeypatch: pytest.MonkeyPatch, steps: int, alike: float, seeds: int, spread: float
) -> None:
    """400 studies each, those that may be tested: false "faster or slower" in at most 5% and two
    standard errors of all, the 95% interval holds the truth in 93% to 97% of the tested (of several
    trainings in no less), and a tenth is found where there are steps enough.
    """
    monkeypatch.setattr(throughput, "RESAMPLES", 300)
    rng = np.random.default_rng(steps + seeds)
    wrong = inside = found = made = 0
    for _ in range(STUDIES):
        arms = [[training(rng, steps, alike, 1.0, spread) for _ in range(seeds)] for _ in range(2)]
        if min(one.independent() for runs in arms for one in runs) < FEWEST_STEPS:
            continue
        made, tested = made + 1, compare_rates(*arms)
        assert tested.p is not None and tested.low is not None and tested.high is not None
        wrong += tested.p <= 0.05
        inside += tested.low <= 0 <= tested.high
        assert (tested.p <= 0.05) == (not tested.low <= 0 <= tested.high)
    for _ in range(STUDIES // 4):
        arms = [
            [training(rng, steps, alike, faster, spread) for _ in range(seeds)]
            for faster in (1.1, 1.0)
        ]
        p = compare_rates(*arms).p
        found += p is not None and p <= 0.05
    assert wrong / STUDIES <= 0.05 + ABOVE
    assert 0.93 - ABOVE / 2 <= inside / made <= (1.0 if seeds > 1 else 0.97 + ABOVE / 2)
    assert made >= 0.9 * STUDIES
    if steps == 500:
        assert found >= 0.95 * STUDIES // 4 if alike < 0.8 else found >= 0.5 * STUDIES // 4


def test_blocks_and_not_steps_are_resampled() -> None:
    rng = np.random.default_rng(1)
    alike = training(rng, 500, 0.85)
    order = rng.permutation(500)
    shuffled = StepTimes(alike.tokens[order], alike.seconds[order])
    assert alike.log_rate_variance() > 3 * shuffled.log_rate_variance()
    assert alike.rate == pytest.approx(shuffled.rate)


def test_trainings_that_differ_are_a_wider_interval_than_their_steps_say() -> None:
    rng = np.random.default_rng(2)
    one = [training(rng, 200, 0.0, faster) for faster in (1.0, 1.2, 0.9)]
    other = [training(rng, 200, 0.0, faster) for faster in (1.1, 0.85, 1.05)]
    alone = compare_rates(one[:1], other[:1])
    together = compare_rates(one, other)
    assert alone.p is not None and alone.p < 0.001
    assert together.p is not None and together.p > 0.2
    assert together.questions_needed() is None


def test_the_same_steps_give_the_same_numbers_and_the_ratio_turns_with_the_arms() -> None:
    rng = np.random.default_rng(3)
    one, other = training(rng, 100, 0.3, 1.3), training(rng, 100, 0.3)
    tested, turned = compare_rates([one], [other]), compare_rates([other], [one])
    assert tested == compare_rates([one], [other])
    assert tested.effect == pytest.approx(-turned.effect) and tested.n == 100
    assert tested.effect == pytest.approx(math.log(one.rate / other.rate))


def test_steps_that_are_like_their_neighbours_count_as_fewer() -> None:
    rng = np.random.default_rng(4)
    assert training(rng, 100, 0.0).independent() > FEWEST_STEPS
    slow = np.where(np.arange(100) < 50, 1.0, 2.0)
    assert StepTimes(np.full(100, 9.0), slow).independent() < FEWEST_STEPS


def test_equal_times_everywhere_know_no_interval() -> None:
    steps = StepTimes(np.full(40, 8.0), np.full(40, 2.0))
    tested = compare_rates([steps], [steps])
    assert (tested.effect, tested.low, tested.p, tested.spread) == (0.0, None, None, None)
