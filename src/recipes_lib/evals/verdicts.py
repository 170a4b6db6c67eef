"""The verdict in a judge's text, or the reason why there is none.

A verdict stands at the very end of the text. A text without one is never a tie and never dropped:
it has a status of its own and widens the interval later.

The forms are those that the end-anchored parser of prometheus-eval takes (`[RESULT] 4`, `[RESULT]
(4)`, `4/5`, `score of 3 out of 5`, `[Final Score: 4]`; `[RESULT] A`, `[RESULT] Response A`,
`Result: B`), and what chat models make of them: Markdown around the verdict (`**[RESULT] A**`),
`[RESULT]: A`, `[[A]]`, a full stop. The anchor is the end of the text and not of any line, digits
are ASCII, and different verdicts in one text are a conflict.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass

_FLAGS = re.IGNORECASE | re.ASCII
_EMPHASIS = re.compile(r"\*+|`+|__+")
_SCORE = r"[(\[\s]*(\d+)(?:[)\]]|\s*/\s*5|\s+out\s+of\s+5)?\]?"
_SCORE_MARK = r"(?:\[(?:result|score)\]|(?<![a-z0-9])(?:score|result))(?:\s+of)?:?"
_ABSOLUTE = re.compile(rf"(?:{_SCORE_MARK}\s*{_SCORE}|\[\[(\d+)\]\])\.?\s*\Z", _FLAGS)
_ABSOLUTE_LINE = re.compile(
    rf"\s*[\[(]?(?:(?:overall|final)\s+)*{_SCORE_MARK}\s*{_SCORE}\.?\s*", _FLAGS
)
_MARK = r"\[result\]:?(?:\s+response)?\s*|\[result:\s*|\[response\s+"
_RELATIVE = re.compile(
    rf"(?:(?:{_MARK}|(?:\A|\n)[ \t]*result(?::\s*|\s+))([AB])\]?|\[\[([AB])\]\])\.?\s*\Z", _FLAGS
)
_RELATIVE_LINE = re.compile(rf"\s*(?:{_MARK}|result(?::\s*|\s+))([A-Z])\]?\.?\s*", _FLAGS)
# Every bracketed result with something that looks like a verdict, wherever it stands; the format
# line of the prompt is none.
_ANY_ABSOLUTE = re.compile(
    r"\[(?:result|score)\]:?[(\[\s]*(\d+(?:\.\d+)?)(?!\s*(?:-|to|or)\s*\d)|\[\[(\d+)\]\]", _FLAGS
)
_ANY_RELATIVE = re.compile(
    r"(?:\[result\]:?(?:\s+response)?[(\s]*|\[result:\s*)([A-Z]|tie)"
    r"(?![a-z0-9'])(?!\s*(?:or|/)\s*[AB]\b)|\[\[([A-Z])\]\]",
    _FLAGS,
)
_REFUSAL = re.compile(
    r"\s*(?:(?:i['’]?m|i\s+am)\s+(?:very\s+|so\s+)?sorry|sorry,|i\s+apologi[sz]e"
    r"|(?:unfortunately,\s+|sorry,?\s+(?:but\s+)?)?(?:i\s+(?:cannot|can\s*not|can['’]?t|won['’]?t"
    r"|will\s+not|must\s+decline|decline)|(?:i['’]?m|i\s+am)\s+(?:unable|not\s+able))"
    r"|as\s+an?\s+(?:ai|language\s+model))\b",
    re.IGNORECASE,
)
_VALUES = ("1", "2", "3", "4", "5", "A", "B")


class Status(enum.StrEnum):
    """What became of one request to the judge; only `ok` has a value."""

    OK = "ok"
    UNPARSED = "unparsed"
    REFUSED = "refused"
    EMPTY = "empty"
    TRUNCATED = "truncated"


@dataclass(frozen=True)
class JudgeVerdict:
    """1-5 in absolute grading, "A" or "B" in a comparison; `reason` says why there is none."""

    status: Status
    value: int | str | None = None
    reason: str | None = None


def _missing(text: str | None, finish_reason: str | None) -> JudgeVerdict | None:
    """What a text is that can hold no verdict."""
    if finish_reason == "length":
        return JudgeVerdict(Status.TRUNCATED, reason="the judge's text ended at its token limit")
    if text is None or not text.strip():
        return JudgeVerdict(Status.EMPTY, reason="the judge wrote nothing")
    return None


def _parse(
    text: str | None,
    finish_reason: str | None,
    end: re.Pattern[str],
    line: re.Pattern[str],
    anywhere: re.Pattern[str],
) -> JudgeVerdict:
    """The verdict at the end of a text, as it is written there (upper case)."""
    if missing := _missing(text, finish_reason):
        return missing
    plain = _EMPHASIS.sub("", text or "")
    match = end.search(plain)
    if not match or _value(match) not in _VALUES:
        if _REFUSAL.match(plain):
            return JudgeVerdict(Status.REFUSED, reason="the judge declined")
        return JudgeVerdict(Status.UNPARSED, reason="no verdict at the end of the text")
    lines = filter(None, map(line.fullmatch, plain.splitlines()))
    given = {_value(found) for found in (match, *anywhere.finditer(plain), *lines)}
    if len(given) > 1:
        return JudgeVerdict(Status.UNPARSED, reason=f"conflict: {', '.join(sorted(given))}")
    return JudgeVerdict(Status.OK, given.pop())


def _value(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()


def parse_absolute(text: str | None, finish_reason: str | None = None) -> JudgeVerdict:
    """Return the 1-5 verdict at the end of a judge's text.

    Args:
        text: what the judge wrote after the prompt, nothing of the prompt.
        finish_reason: "length" if the judge was cut off at its token limit; such a text has no
            verdict, whatever it ends with.

    Example:
        >>> parse_absolute("Clear and correct. **[RESULT] 4**").value
        4
        >>> parse_absolute("So the overall score is 4").status.value
        'unparsed'
    """
    found = _parse(text, finish_reason, _ABSOLUTE, _ABSOLUTE_LINE, _ANY_ABSOLUTE)
    return found if found.value is None else JudgeVerdict(Status.OK, int(found.value))


def parse_relative(text: str | None, finish_reason: str | None = None) -> JudgeVerdict:
    """Return the A/B verdict at the end of a judge's text; arguments as for `parse_absolute`.

    Example:
        >>> parse_relative("A names both causes. [RESULT]: A.").value
        'A'
        >>> parse_relative("[RESULT] B was tempting. Final: [RESULT] A").reason
        'conflict: A, B'
    """
    return _parse(text, finish_reason, _RELATIVE, _RELATIVE_LINE, _ANY_RELATIVE)


def parse_json(
    text: str | None, allowed: tuple[str, ...], finish_reason: str | None
) -> JudgeVerdict:
    """Return the verdict of a judge that answers `{"feedback": ..., "result": ...}`.

    Example:
        >>> parse_json('{"feedback": "A is right.", "result": "A"}', ("A", "B"), "stop").value
        'A'
    """
    if missing := _missing(text, finish_reason):
        return missing
    try:
        found = json.loads(_EMPHASIS.sub("", text or "").removeprefix("json"))
        value = str(found["result"]).strip().upper()
    except (ValueError, KeyError, TypeError, RecursionError):
        return JudgeVerdict(Status.UNPARSED, reason="the text is not the JSON that was asked for")
    if value not in allowed:
        return JudgeVerdict(Status.UNPARSED, reason=f"the result {value[:20]!r} was not asked for")
    return JudgeVerdict(Status.OK, int(value) if value.isdigit() else value)
