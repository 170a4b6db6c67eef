"""How often does a report claim what only its judge believes, with and without human labels? Judges
of every kind, simulated, through the code that tests a win rate.

    python benchmarks/human_labels.py [--studies 1000]

805 questions, 30% ties. The judge draws some verdicts anew and turns some losses into wins. With
three trainings each has its own rate (SD 2 points) and its own labels. One core; about 6 ms for a
study.
"""

from __future__ import annotations

import argparse

import numpy as np

from recipes_lib.statistics.labels import rectified
from recipes_lib.statistics.paired import Array
from recipes_lib.statistics.unresolved import compare

QUESTIONS, TIES, SEED_DEVIATION = 805, 0.3, 0.02
# Shares of verdicts that the judge draws anew, and of losses that it calls wins.
JUDGES = {
    "perfect": (0.0, 0.0),
    "biased": (0.3, 0.4),
    "rarely wrong": (0.0, 0.2),
    "useless": (1.0, 0.0),
    "useless, biased": (1.0, 0.5),
}


def outcomes(drawn: Array, rate: Array | float) -> Array:
    """Return wins, ties and losses at a win rate, a tie counted as half."""
    win = np.asarray(rate - TIES / 2)
    return np.where(drawn < win, 1.0, np.where(drawn < win + TIES, 0.5, 0.0))


def study(
    rng: np.random.Generator, rate: float, judge: str, labels: int, seeds: int = 1
) -> tuple[Array, Array]:
    """Return what the judge says of all answers, and what people say of some, by training and
    question.
    """
    shape, (noise, bias) = (seeds, QUESTIONS), JUDGES[judge]
    rates = rate + SEED_DEVIATION * rng.normal(size=(seeds, 1)) * (seeds > 1)
    truth = outcomes(rng.random(shape), rates)
    anew = rng.random(shape) < noise
    judged = np.where(anew, outcomes(rng.random(shape), 0.5), truth)
    judged[(judged == 0) & (rng.random(shape) < bias)] = 1.0
    asked = rng.random(shape).argsort(axis=1).argsort(axis=1) < labels
    return judged, np.where(asked, truth, np.nan)


def simulate(
    rate: float, judge: str, labels: int, studies: int, seeds: int = 1
) -> tuple[float, float, float]:
    """Return the share of studies that claim a difference without labels and with them, and of
    those whose interval with them holds the truth.
    """
    rng = np.random.default_rng([labels, seeds, list(JUDGES).index(judge), round(100 * rate)])
    half, counts = np.full((1, QUESTIONS), 0.5), np.zeros(3)
    for _ in range(studies):
        judged, human = study(rng, rate, judge, labels, seeds)
        alone, tested = compare(judged, half), compare(rectified(judged, human), half)
        assert tested.p is not None and tested.low is not None and tested.high is not None
        holds = 0.5 + tested.low <= rate <= 0.5 + tested.high
        counts += (alone.p or 0.0) <= 0.05, tested.p <= 0.05, holds
    alone_claims, claims, covered = (float(share) for share in counts / studies)
    return alone_claims, claims, covered


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description="Claims of a judge with human labels.")
    parser.add_argument("--studies", type=int, default=1000)
    studies = parser.parse_args().studies
    print(
        "judge            trainings  labels of each  true rate  claims, judge alone"
        "  claims, labels  coverage"
    )
    for judge in JUDGES:
        for seeds in (1, 3):
            for labels in (20, 50, 200):
                for rate in (0.5, 0.6):
                    shares = simulate(rate, judge, labels, studies, seeds)
                    print(
                        f"{judge:15}  {seeds:9}  {labels:14}  {rate:9}  {shares[0]:19.3f}"
                        f"  {shares[1]:14.3f}  {shares[2]:8.3f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
