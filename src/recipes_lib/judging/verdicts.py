"""The verdict in a judge's text, or the reason why there is none.

A verdict stands at the very end of the text. A text without one is never a tie and never dropped:
it has a status of its own and widens the interval later.

The forms are those that the end-anchored parser of prometheus-eval takes (`[RESULT] 4`, `[RESULT]
(4)`, `4/5`, `score of 3 out of 5`, `[Final Score: 4]`; `[RESULT] A`, `[RESULT] Response A`,
`Result: B`), plus one full stop, with three differences: the anchor is the end of the text and not
of any line, digits are ASCII, and different verdicts in one text are a conflict.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

_FLAGS = re.IGNORECASE | re.ASCII
_SCORE = r"[(\[\s]*(\d+)(?:[)\]]|\s*/\s*5|\s+out\s+of\s+5)?"
_SCORE_MARK = r"(?:\[(?:result|score)\]|(?<![a-z0-9])(?:score|result))(?:\s+of)?:?"
_ABSOLUTE = re.compile(rf"{_SCORE_MARK}\s*{_SCORE}\.?\s*\Z", _FLAGS)
_ABSOLUTE_LINE = re.compile(
    rf"\s*[\[(]?(?:(?:overall|final)\s+)*{_SCORE_MARK}\s*{_SCORE}\.?\s*", _FLAGS
)
_RELATIVE = re.compile(
    r"(?:\[result\](?:\s+response)?\s*|\[result:\s*|\[response\s+|(?:\A|\n)["
    r" \t]*result(?::\s*|\s+))([AB])\]?\.?\s*\Z",
    _FLAGS,
)
_RELATIVE_LINE = re.compile(
    r"\s*(?:\[result\](?:\s+response)?\s*|\[result:\s*|\[response\s+|result(?::\s*|\s+))([A-Z])\]?\.?\s*",
    _FLAGS,
)
# Every bracketed result with something that looks like a verdict, wherever it stands; the format
# line of the prompt is none.
_ANY_ABSOLUTE = re.compile(
    r"\[(?:result|score)\]:?[(\[\s]*(\d+(?:\.\d+)?)(?!\s*(?:-|to|or)\s*\d)", _FLAGS
)
_ANY_RELATIVE = re.compile(
    r"(?:\[result\]:?(?:\s+response)?[(\s]*|\[result:\s*)([A-Z]|tie)(?![a-z0-9'])(?!\s*(?:or|/)\s*[AB]\b)",
    _FLAGS,
)
_REFUSAL = re.compile(
    r"\s*(?:(?:i['’]?m|i\s+am)\s+(?:very\s+|so\s+)?sorry|sorry,|i\s+apologi[sz]e|(?:unfortunately,\s+|sorry,?\s+(?:but\s+)?)?"
    r"(?:i\s+(?:cannot|can\s*not|can['’]?t|won['’]?t|will\s+not|must\s+decline|decline)|(?:i['’]?m|i\s+am)\s+(?:unable|not\s+able))"
    r"|as\s+an?\s+(?:ai|language\s+model))\b",
    re.IGNORECASE,
)


class Status(enum.StrEnum):
    """What became of one request to the judge; only `ok` has a value."""

    OK = "ok"
    UNPARSED = "unparsed"
    REFUSED = "refused"
    EMPTY = "empty"
    TRUNCATED = "truncated"


@dataclass(frozen=True)
class Verdict:
    """1-5 in absolute grading, "A" or "B" in a comparison; `reason` says why there is none."""

    status: Status
    value: int | str | None = None
    reason: str | None = None


def _parse(
    text: str | None,
    finish_reason: str | None,
    end: re.Pattern[str],
    line: re.Pattern[str],
    anywhere: re.Pattern[str],
) -> Verdict:
    """The verdict at the end of a text, as it is written there (upper case)."""
    if finish_reason == "length":
        return Verdict(Status.TRUNCATED, reason="the judge's text ended at its token limit")
    if text is None or not text.strip():
        return Verdict(Status.EMPTY, reason="the judge wrote nothing")
    match = end.search(text)
    if not match or match[1].upper() not in ("1", "2", "3", "4", "5", "A", "B"):
        if _REFUSAL.match(text):
            return Verdict(Status.REFUSED, reason="the judge declined")
        return Verdict(Status.UNPARSED, reason="no verdict at the end of the text")
    lines = filter(None, map(line.fullmatch, text.splitlines()))
    given = {found[1].upper() for found in (match, *anywhere.finditer(text), *lines)}
    if len(given) > 1:
        return Verdict(Status.UNPARSED, reason=f"conflict: {', '.join(sorted(given))}")
    return Verdict(Status.OK, given.pop())


def parse_absolute(text: str | None, finish_reason: str | None = None) -> Verdict:
    """Return the 1-5 verdict at the end of a judge's text.

    Args:
        text: what the judge wrote after the prompt, nothing of the prompt.
        finish_reason: "length" if the judge was cut off at its token limit; such a text has no
            verdict, whatever it ends with.

    Example:
        >>> parse_absolute("Clear and correct. [RESULT] 4").value
        4
        >>> parse_absolute("So the overall score is 4").status.value
        'unparsed'
    """
    found = _parse(text, finish_reason, _ABSOLUTE, _ABSOLUTE_LINE, _ANY_ABSOLUTE)
    return found if found.value is None else Verdict(Status.OK, int(found.value))


def parse_relative(text: str | None, finish_reason: str | None = None) -> Verdict:
    """Return the A/B verdict at the end of a judge's text; arguments as for `parse_absolute`.

    Example:
        >>> parse_relative("A names both causes. [RESULT] A.").value
        'A'
        >>> parse_relative("[RESULT] B was tempting. Final: [RESULT] A").reason
        'conflict: A, B'
    """
    return _parse(text, finish_reason, _RELATIVE, _RELATIVE_LINE, _ANY_RELATIVE)
