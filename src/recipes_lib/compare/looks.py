"""What a table says of the looks at its results: how many there were, and what was added or removed
after each. `study/ledger.py` keeps them, `statistics/looks.py` says what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipes_lib.compare.wording import count

_MOST = 6  # changes that the line holds


@dataclass(frozen=True)
class Looks:
    """The looks at a study's results.

    Args:
        number: of results that are no two alike, these among them; 0 where it is not known.
        changes: what was added or removed after a look, in the order of the looks.
        corrected: comparisons whose p is that of several looks.
        unrecorded: why this look does not stand in the ledger; empty where it does.
    """

    number: int
    changes: tuple[str, ...] = ()
    corrected: int = 0
    unrecorded: str = ""

    @property
    def sentence(self) -> str:
        """The line of the report."""
        times = "once" if self.number == 1 else f"{self.number} times"
        parts = [f"The results of this study were looked at {times}."]
        if not self.number:
            parts = ["How often the results of this study were looked at is not known."]
        if earlier := len(self.changes[:-_MOST]):
            parts.append(f"Not listed: {count(earlier, 'earlier change')}.")
        parts += [f"{change}." for change in self.changes[-_MOST:]]
        if self.corrected:
            parts.append(
                f"For {count(self.corrected, 'comparison')} p is divided by the part of the 5% that"
                " this look has."
            )
        if self.unrecorded:
            parts.append(f"This look could not be recorded: {self.unrecorded}.")
        return " ".join(parts)
