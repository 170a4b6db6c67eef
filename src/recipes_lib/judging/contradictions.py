"""A verdict against the judge's own words: how often they disagree, and whom the disagreement
favours.

The rule, for a comparison. A sentence decides if it says in so many words that one response beats
the other: "Response A is (significantly) better than / superior to Response B", "Response B is
worse than / inferior to Response A", "makes Response A (the) better / superior / stronger",
"Response B is the better choice / superior / more effective ... than Response A", "Response A
excels / stands out / outperforms". The last such sentence counts, as the judge's conclusion.
Negated and hedged sentences ("not better", "neither", "if", "could be better"), and sentences that
name a winner twice differently, do not decide. A row is decidable if its words decide and its
verdict names a side; it contradicts itself if the two are different sides.

In absolute grading the words decide where a sentence states the overall or final score ("the
overall score is 4").
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from recipes_lib.eval_log import StoredContradictions
from recipes_lib.statistics.intervals import wilson

_R = r"(?:response|assistant|answer)\s+([ab])(?:['’]s\b[^.;]{0,60}?)?"
_BE = (
    r"(?:(?:seems|appears|proves)(?:\s+to\s+be)?|emerges\s+as|stands\s+out\s+as|is|was|would\s+be(?:\s+considered)?|can\s+be\s+considered|to\s+be"
    r"|(?:is|was)(?:\s+(?:generally|therefore))?\s+(?:deemed|considered|judged|rated|regarded|seen)(?:\s+(?:as|to\s+be))?)"
)
_DEGREE = (
    r"(?:\s+(?:the|a|an|clearly|far|much|slightly|significantly|considerably|marginally|notably|generally|overall|therefore|thus|ultimately"
    r"|somewhat|substantially|clear|evidently|definitely|indeed|also|as|likely|being|superior|even))*"
)
_UP = r"(?:better|superior|stronger|preferable|winner|preferred|best|more\s+[a-z-]+)"
_DOWN = r"(?:worse|inferior|weaker|less\s+[a-z-]+)"
_MIDDLE = r"[^.;]{0,160}?"
# Each pattern names the better response (up) or the worse one (down) in its first group.
_UPWARD = [
    re.compile(rf"\b{_R}\s*,?\s+(?:\w+ly\s+)?{_BE}{_DEGREE}\s+{_UP}\b", re.IGNORECASE),
    re.compile(
        rf"\b(?:makes?|making|made|renders?|rendering|find|considers?|deem)\s+(?:it\s+clear\s+that\s+)?{_R}{_DEGREE}\s+(?:to\s+be\s+)?{_DEGREE}\s*{_UP}\b",
        re.IGNORECASE,
    ),
    re.compile(
        rf"\b{_R}\s+(?:\w+ly\s+)?(?:outperforms|surpasses|excels|stands\s+out|outshines|has\s+the\s+edge|has\s+an\s+edge)\b",
        re.IGNORECASE,
    ),
    re.compile(rf"\b{_R}\s+{_MIDDLE}(?:making|rendering)\s+it{_DEGREE}\s+{_UP}\b", re.IGNORECASE),
]
_DOWNWARD = [
    re.compile(rf"\b{_R}\s*,?\s+(?:\w+ly\s+)?{_BE}{_DEGREE}\s+{_DOWN}\b", re.IGNORECASE),
    re.compile(
        rf"\b(?:makes?|making|made|renders?|rendering)\s+{_R}{_DEGREE}\s+{_DOWN}\b", re.IGNORECASE
    ),
]
_UNDECIDED = re.compile(
    r"\b(?:neither|not\s+(?:\w+\s+)?(?:better|superior|worse|inferior)|nor\b|if\b|could\s+be|might\s+be|may\s+be|equally|both\s+responses\s+are\s+(?:better|worse))",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_STATED = re.compile(
    r"\b(?:overall|final)\s+(?:score|rating)\s+(?:is|of|would\s+be|should\s+be)\s+(?:a\s+)?([1-5])\b(?!\s*(?:-|to|or)\s*\d)",
    re.IGNORECASE,
)
_RESULT = re.compile(r"\[(?:result|score)\].*", re.IGNORECASE | re.DOTALL)


def stated_winner(text: str) -> str | None:
    """Return the response ("A" or "B") that a judge's own words call the better one, or None if
    they do not decide.

    Example:
        >>> stated_winner("A is brief. Therefore, Response B is significantly better than Response A. [Overall] 5")
        'B'
    """  # noqa: E501
    for sentence in reversed(_SENTENCE.split(text)):
        if _UNDECIDED.search(sentence):
            continue
        better = {one[1].upper() for form in _UPWARD for one in form.finditer(sentence)}
        worse = {one[1].upper() for form in _DOWNWARD for one in form.finditer(sentence)}
        better |= {"B" if one == "A" else "A" for one in worse}
        if len(better) == 1:
            return better.pop()
    return None


def stated_score(text: str) -> int | None:
    """Return the score that a grading judge states in a sentence before its verdict, or None.

    Example:
        >>> stated_score("Minor issues. So the overall score is 4. [RESULT] 3")
        4
    """
    stated = _STATED.findall(_RESULT.sub("", text))
    return int(stated[-1]) if stated else None


def find_contradictions(rows: Iterable[tuple[str, str | int | None]]) -> StoredContradictions:
    """Count contradictions over (text, verdict) pairs.

    Args:
        rows: the judge's text and its verdict: "A", "B" (a comparison), 1-5 (a grade), or anything
            else for a tie or none.
    """
    n = decidable = count = for_first = graded = 0
    for text, verdict in rows:
        n += 1
        if isinstance(verdict, int):
            words: str | int | None = stated_score(text)
            graded += words is not None and words != verdict
            for_first += words is not None and verdict > int(words)
        else:
            words = stated_winner(text) if verdict in ("A", "B") else None
            for_first += words == "B" and verdict == "A"
        decidable += words is not None
        count += words is not None and words != verdict
    interval, direction = wilson(count, decidable), None
    if count:
        first, second = "Response A", "Response B"
        if graded:
            first, second = "a higher score than the words", "a lower score than the words"
        most = max(for_first, count - for_first)
        direction = f"{most} of {count} favour {first if most == for_first else second}"
    return {
        "n": n,
        "decidable": decidable,
        "count": count,
        "for_first": for_first,
        "rate": interval.estimate,
        "interval": interval.to_dict(),
        "direction": direction,
    }
