"""Many looks, one error rate: which part of its 5% a comparison has when its results are looked at
before all that was planned is there, or again after something was added.

Without this, whoever looks after every new seed and stops once p <= 0.05 is wrong far more often
than in 5% of studies. Here every look at other results of one comparison is a test of its own, and
p is divided by the part of the level that this look has:

- The last planned look has all that the looks before it left. It is the first one at which the plan
  that the first look found is complete (of a study that plans N looks, the N-th plan). Where nobody
  looked before, that is everything, and p is as it is.
- The j-th look before it has 0.2 / (j (j + 1)). However many there are they add up to 0.2, so the
  last planned one keeps four fifths.
- A look after it has nothing: the whole 5% was given away, and any part for what was added since
  would come on top of it.

Why the error stays at 5%: the parts add up to one, so the smallest p / part over all looks is
itself a p value (the chance that any of them is at most x is at most the sum of x times the parts,
whatever their dependence), and Holm's correction over such p values holds 5% over all comparisons
and all looks together. Parts are decided by what was planned and by the number of looks, never by
what a look showed.

What is assumed is that nobody chooses from what was seen how much to add: a p over a sample whose
size follows from its own first half is not uniform. The last planned look of a study that changed
no plan is free of that.

Source: a Bonferroni correction over looks (Pocock (1977), Biometrika 64, on why looks need one);
keeping nearly all for the last one is Haybittle (1971), British Journal of Radiology 44, and Peto
et al. (1976), British Journal of Cancer 34; spending by the number of looks is Lan and DeMets
(1983), Biometrika 70; on sizes chosen from what was seen, Proschan and Hunsberger (1995),
Biometrics 51.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EARLY = 0.2  # of the level, for all looks before the last planned one


@dataclass(frozen=True)
class Look:
    """One comparison as it was looked at.

    Args:
        results: a hash of its results; the same results are one look, however often.
        plan: a hash of the seeds and questions that the study planned for it; empty where whoever
            looked knew no plan.
        complete: whether the results are all that was planned.
    """

    results: str
    plan: str = ""
    complete: bool = False


def last_planned(looks: Sequence[Look], planned: int = 1) -> int | None:
    """Return the place of the last planned look; None while there was none.

    Args:
        planned: how many looks the study planned, each with something added.
    """
    plans = list(dict.fromkeys(one.plan for one in looks if one.plan))
    if len(plans) < planned:
        return None
    last = (one.complete and one.plan == plans[planned - 1] for one in looks)
    return next((place for place, is_last in enumerate(last) if is_last), None)


def level_share(before: Sequence[Look], now: Look, planned: int = 1) -> float:
    """Return which part of the level a comparison has now; its p is divided by that.

    Args:
        before: the looks at this comparison, in their order.
        planned: as for `last_planned`.

    Example:
        >>> half, whole = Look("1 seed", "2 seeds"), Look("2 seeds", "2 seeds", complete=True)
        >>> level_share([], whole), level_share([], half), level_share([half], whole)
        (1.0, 0.1, 0.9)
        >>> level_share([whole], Look("3 seeds", "3 seeds", complete=True))
        0.0
    """
    looks = [*before, now]
    last = last_planned(looks, planned)
    early = dict.fromkeys(one.results for one in looks[:last])
    parts = {results: EARLY / (j * (j + 1)) for j, results in enumerate(early, 1)}
    if last is not None:
        mine = looks[last].results
        parts[mine] = 1.0 - sum(part for one, part in parts.items() if one != mine)
    return parts.get(now.results, 0.0)
