"""Did you mean: the nearest names for a word that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_names(word: str, names: Iterable[str], at_most: int = 1) -> list[str]:
    """Return the names most like `word`; hyphens, underscores and case do not count.

    Example:
        >>> near_names("learning-rte", ["learning_rate", "seed"])
        ['learning_rate']
    """
    if len(word) < 3:
        return []
    plain = {name.replace("-", "_").lower(): name for name in names}
    return [
        plain[near]
        for near in difflib.get_close_matches(
            word.replace("-", "_").lower(), plain, n=at_most, cutoff=0.65
        )
    ]


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> list[str]:
    """Return the hint `did you mean X?` as a list of one line, or of none.

    Args:
        prefix: put before the name, for example `train.`.
    """
    return [f"did you mean {prefix}{near}?" for near in near_names(word, names)]
