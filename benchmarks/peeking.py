"""How often does a study whose arms are alike end in a claim, if somebody looks again and again,
adds seeds or questions in between, and stops once a report says "better" or "worse"?

    python benchmarks/peeking.py [--studies 2000] [--only NAME]

Up to ten looks. Studies are those of `statistics_simulation.py`, claims those of its copy of the
report's code, and each look's part of the level is that of `statistics/looks.py`, as the ledger of
a study takes it. Promised: at most 5% (and two standard errors), however often somebody looks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from statistics_simulation import SCORES, Array, Scores, _tables, claims_of, draw_studies

from recipes_lib.statistics.looks import Look, level_share

LOOKS = 10
BATCH = 100
# Of the looks before, and the number of this one: which part of the level it has.
Share = Callable[[list[Look], int], float]


def uncounted(before: list[Look], number: int) -> float:
    """Every look at the whole level, as if it were the first."""
    return 1.0


def not_planned(before: list[Look], number: int) -> float:
    """The study plans what it has; after the first look somebody adds to it."""
    return _share(before, Look(str(number), str(number), complete=True), 1)


def planned(before: list[Look], number: int) -> float:
    """The study plans ten looks, with something added in between."""
    return _share(before, Look(str(number), str(number), complete=True), LOOKS)


def unfinished(before: list[Look], number: int) -> float:
    """The study plans everything, and somebody looks before all of it is there."""
    return _share(before, Look(str(number), "all", complete=number == LOOKS), 1)


def _share(before: list[Look], now: Look, looks: int) -> float:
    share = level_share(before, now, looks)
    before.append(now)
    return share


WAYS: dict[str, Share] = {
    "nobody counts": uncounted,
    "not planned": not_planned,
    "looks: 10": planned,
    "before all is there": unfinished,
}


@dataclass(frozen=True)
class Kind:
    """What is added: questions (the first `step`, then as many again), or seeds (the first two,
    because a report says of one that it is one training, then one at a time).

    `eager` adds a fifth where p is below 0.2 and doubles otherwise: sizes that follow from what was
    seen, which the method does not allow.
    """

    name: str
    scores: Scores
    arms: int = 2
    metrics: int = 1
    step: int = 80
    by_seed: bool = False
    eager: bool = False

    def draw(self, studies: int, rng: np.random.Generator) -> Array:
        """Return studies with all that may be added."""
        n = self.step * (1 if self.by_seed else 2 * LOOKS if self.eager else LOOKS)
        scores = replace(self.scores, seeds=LOOKS + 1 if self.by_seed else self.scores.seeds)
        return draw_studies(scores, self.arms, self.metrics, n, studies, rng)

    def part(self, values: Array, size: int) -> Array:
        """Return what is there at a look."""
        return values[:, :, :, :size] if self.by_seed else values[..., :size]

    def sizes(self) -> list[int]:
        """Return the sizes of all looks, where they follow no result."""
        numbers = range(1, LOOKS + 1)
        return [number + 1 if self.by_seed else number * self.step for number in numbers]


_BY_NAME = {scores.name: scores for scores in SCORES}
RIGHT, GRADES = _BY_NAME["right or wrong"], _BY_NAME["grades"]
KINDS = (
    Kind("right or wrong, 80 questions more", RIGHT),
    Kind("grades, 80 questions more", GRADES),
    Kind("3 arms, 3 metrics, 80 questions more", RIGHT, arms=3, metrics=3),
    Kind("grades, a seed more (SD 0.3)", replace(GRADES, spread=0.3), step=100, by_seed=True),
    Kind("grades, a seed more (SD 0.05)", replace(GRADES, spread=0.05), step=100, by_seed=True),
    Kind("grades, sizes chosen by p", GRADES, eager=True),
)


def claimed(kind: Kind, studies: int) -> dict[str, float]:
    """Return in which share of studies each way of looking ends in a claim."""
    rng = np.random.default_rng([17, *kind.name.encode()])
    hits = dict.fromkeys(WAYS, 0)
    for _ in range(studies // BATCH):
        values = kind.draw(BATCH, rng)
        if kind.eager:
            for one in values:
                for way, share in WAYS.items():
                    hits[way] += _eager(kind, one[None], share)
            continue
        tables = []
        for size in kind.sizes():
            part = kind.part(values, size)
            tables.append(list(_tables(part, replace(kind.scores, seeds=part.shape[3]))))
        for way, share in WAYS.items():
            before: list[Look] = []
            shares = [share(before, number) for number in range(1, LOOKS + 1)]
            for looks in zip(*tables, strict=True):
                hits[way] += any(
                    claims_of([replace(row, level_share=part) for row in table])
                    for table, part in zip(looks, shares, strict=True)
                    if part
                )
    return {way: count / studies for way, count in hits.items()}


def _eager(kind: Kind, values: Array, share: Share) -> bool:
    """Whether somebody who adds by what p says ends in a claim."""
    before: list[Look] = []
    size = kind.step
    for number in range(1, LOOKS + 1):
        if share is unfinished and number == LOOKS:
            size = values.shape[-1]  # all that was planned
        (table,) = _tables(kind.part(values, size), kind.scores)
        part = share(before, number)
        if part and claims_of([replace(row, level_share=part) for row in table]):
            return True
        p = min(row.tested.p or 1.0 for row in table)
        size = min(values.shape[-1], size + (size // 5 if p < 0.2 else size))
    return False


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(
        description="False claims of studies that are looked at often."
    )
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    options = parser.parse_args()
    begun = time.process_time()
    print(f"{'up to ten looks':38}  {'  '.join(WAYS)}")
    for kind in KINDS:
        if options.only in kind.name:
            found = claimed(kind, options.studies)
            cells = (f"{100 * found[way]:>{len(way) - 1}.1f}%" for way in WAYS)
            print(f"{kind.name:38}  {'  '.join(cells)}", flush=True)
    print(f"{options.studies} studies each, {time.process_time() - begun:.0f} CPU s")


if __name__ == "__main__":
    main()
