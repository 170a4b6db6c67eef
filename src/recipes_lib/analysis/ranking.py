"""Many arms in one answer: those that no other is shown to beat, and those that some are.

The first of many estimates was selected for being the first, so the order claims nothing. What is
claimed are the tests: "worse than some" is one or more of all pairs, corrected together (Holm), and
so it is false of any arm in at most 5% of tables.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from recipes_lib.analysis.table_row import TableRow
from recipes_lib.analysis.text import sentence_list
from recipes_lib.core.terminal import count

FEWEST_ARMS = 5  # four have six pairs, which can be read one after another


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The arms of a table in the order of their estimates."""

    unbeaten: tuple[str, ...]  # that no arm is shown to beat
    beaten: dict[str, tuple[str, ...]]  # each with the arms that are shown to be better
    unranked: tuple[str, ...]  # about which no pair has a verdict
    without_verdict: int  # pairs
    pairs: int

    def text(self, where: str) -> str:
        """Return the answer about a metric."""
        arms = len(self.unbeaten) + len(self.beaten) + len(self.unranked)
        if not self.beaten:
            lines = [f"None of {arms} arms is shown to be worse than another in {where}."]
        else:
            verb = "is" if len(self.unbeaten) == 1 else "are"
            lines = [
                f"{len(self.unbeaten)} of {arms} arms {verb} not shown to be worse than any in"
                f" {where}: {sentence_list(self.unbeaten)}."
            ]
            worse = []
            for arm, rivals in self.beaten.items():
                worse.append(f"{arm} (than {sentence_list(rivals, 2)})")
            lines.append(f"Shown to be worse: {sentence_list(worse)}.")
            lines.append(
                "The order is that of the estimates, and selected: no place in it is tested."
            )
        if self.unranked:
            lines.append(f"No verdict about {sentence_list(self.unranked)}.")
        if self.without_verdict:
            pairs = count(self.pairs, "pair")
            lines.append(f"Without a verdict: {self.without_verdict} of {pairs}.")
        return " ".join(lines)


def rank(rows: Sequence[TableRow], winners: Sequence[str | None]) -> Ranking | None:
    """Return the ranking of the arms of these rows, one for each pair; None of few arms, or without
    a verdict. The winner is the arm shown to be better, "" if none is, None without a verdict.
    """
    ahead: dict[str, list[float]] = defaultdict(list)  # of every other arm
    better_than: dict[str, list[str]] = defaultdict(list)
    ranked: set[str] = set()
    for row, winner in zip(rows, winners, strict=True):
        difference = row.difference or 0.0
        ahead[row.first].append(difference if row.higher_is_better else -difference)
        ahead[row.second].append(-ahead[row.first][-1])
        if winner is not None:
            ranked.update(row.arms)
        if winner:
            better_than[row.second if winner == row.first else row.first].append(winner)
    if len(ahead) < FEWEST_ARMS or not ranked:
        return None
    order = sorted(ahead, key=lambda arm: -fmean(ahead[arm]))
    beaten = {arm: tuple(better_than[arm]) for arm in order if arm in better_than}
    return Ranking(
        unbeaten=tuple(arm for arm in order if arm in ranked and arm not in beaten),
        beaten=beaten,
        unranked=tuple(arm for arm in order if arm not in ranked),
        without_verdict=sum(winner is None for winner in winners),
        pairs=len(rows),
    )
