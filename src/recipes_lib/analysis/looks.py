"""The looks of a study: after how many seeds it may stop, and what share of 5% each look tests at.

The shares add up to one, so at most 5% of such studies make a false claim, whatever the looks have
in common (Bonferroni). Boundaries that count on what they have in common, as O'Brien and Fleming's,
are wrong for t tests with few seeds. Every statement comes from the interval at the look's level (a
repeated confidence interval; Jennison and Turnbull 1989, JRSS B 51). Needs no numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Of the level. The earlier looks share the rest equally: most studies are decided by all seeds.
LAST_SHARE = 0.8
# A look stops a study that will show nothing: where the chance that it does is less than this.
FUTILE_BELOW = 0.1


@dataclass(frozen=True)
class Look:
    """A test of a study after some of its seeds."""

    number: int  # from 1
    of: int
    seeds: int  # of each arm, the first ones declared
    declared: int  # seeds of each arm
    share: float  # of the level
    saved: int  # trainings that are not needed if the study stops here

    @property
    def is_last(self) -> bool:
        """Whether no look comes after it."""
        return self.number == self.of

    @property
    def place(self) -> str:
        """Which look it is, in a sentence."""
        return f"look {self.number} of {self.of}, after {self.seeds} of {self.declared} seeds"


def shares(looks: int) -> tuple[float, ...]:
    """Return the share of the level of each of so many looks.

    Example:
        >>> shares(1), shares(2), shares(3)
        ((1.0,), (0.2, 0.8), (0.1, 0.1, 0.8))
    """
    earlier = looks - 1
    if not earlier:
        return (1.0,)
    share = round((1 - LAST_SHARE) / earlier, 12)
    return (share,) * earlier + (LAST_SHARE,)


def looks_after(seeds: Sequence[int], arms: int) -> tuple[Look, ...]:
    """Return the looks of a study of so many arms, after these numbers of seeds."""
    looks = []
    for number, share in enumerate(shares(len(seeds)), 1):
        count = seeds[number - 1]
        saved = arms * (seeds[-1] - count)
        looks.append(Look(number, len(seeds), count, declared=seeds[-1], share=share, saved=saved))
    return tuple(looks)
