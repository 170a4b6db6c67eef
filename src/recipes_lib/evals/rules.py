"""The rules that an answer is checked by: what each wants under `expected`, and when it passes.

Rules read the answer's text alone, without leading and trailing space. An answer that was cut and
fails, fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema
import jsonschema.exceptions

from recipes_lib.config.documents import did_you_mean
from recipes_lib.core.errors import DataError

# A number as people write it: 1,234.5, -3, 2e-3. A sign counts only where no digit or letter stands
# before it: 2024-05-17 ends in 17, and 3-5 in 5.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?:(?<![\w.)\]])[-+])?\.\d+"
)
_FENCED = re.compile(r"```(?:\w+)?\n(.*?)```", re.DOTALL)
_MARKDOWN = re.compile(r"[*_`]+|\\boxed|\\text")
# "C", "(C)", "C.", "C) Paris", "C: Paris" at the start of a line
_ALONE = re.compile(r"^\W*([A-Z])(?:[).:,\]}]|\s*$|\s+[-\u2013\u2014])", re.MULTILINE)
# "the answer is C", "Answer: (C)", "option C", "It is C.", "I choose C", "... is C." at line end
_NAMED = re.compile(
    r"\b(?:answer|choice|option|it|choose|pick|select)\b"
    r"(?:\s+(?:is|would\s+be|was|must\s+be|should\s+be)\b|\s*:)?"
    r"(?:\s+(?:option|choice|answer|letter)\b)?\s*[({\[\"']*(?!i\s+[a-z])([A-Za-z])\b(?!['\u2019])"
    r"|\bis\s+([A-Z])\W*$",
    re.IGNORECASE | re.MULTILINE,
)
# "C is correct", "option C is the right one"
_CORRECT = re.compile(r"\b([A-Z])[)}\]\"']*\s+is\s+(?:the\s+)?(?:correct|right|best)\b")


@dataclass(frozen=True)
class AnswerRule:
    """One rule: the name of a check in RULES, what is expected, and how strictly."""

    name: str
    expected: Any
    ignore_case: bool = False
    tolerance: float = 0.0

    def passes(self, answer: str) -> bool:
        """Whether an answer passes.

        Example:
            >>> AnswerRule("choice", "C").passes("The answer is **C**.")
            True
        """
        return RULES[self.name].passes(self, answer.strip())


@dataclass(frozen=True)
class RuleKind:
    """What a check wants under `expected` (checked when the rows are read), and its rule."""

    wants: str
    fits: Callable[[Any], bool]
    passes: Callable[[AnswerRule, str], bool]


def rule_of(written: Mapping[str, object]) -> AnswerRule:
    """Return a check of a row.

    Raises:
        DataError: there is no such check, or it cannot use what is expected.
    """
    name, expected = str(written.get("check") or ""), written.get("expected")
    if name not in RULES:
        hints = (*did_you_mean(name, list(RULES)), f"checks: {', '.join(RULES)}")
        what = f"unknown check '{name}'" if name else "a row needs a 'check', or a list of 'checks'"
        raise DataError(what, *hints)
    if unknown := sorted(written.keys() - {"check", "expected", "ignore_case", "tolerance"}):
        raise DataError(f"a check has no key '{unknown[0]}'")
    if not RULES[name].fits(expected):
        raise DataError(f"check '{name}' expects {RULES[name].wants}, not {expected!r}")
    tolerance = written.get("tolerance", 0.0)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or tolerance < 0:
        raise DataError(f"'tolerance' must be 0 or more, not {tolerance!r}")
    return AnswerRule(name, expected, bool(written.get("ignore_case", False)), float(tolerance))


def _folded(check: AnswerRule, text: str) -> str:
    return text.casefold() if check.ignore_case else text


def _texts(check: AnswerRule) -> list[str]:
    expected = check.expected if isinstance(check.expected, list) else [check.expected]
    return [_folded(check, text.strip()) for text in expected]


def _number(check: AnswerRule, answer: str) -> bool:
    """The last number of the answer is the expected one, within the tolerance."""
    found = _NUMBER.findall(answer)
    if not found:
        return False
    return abs(float(found[-1].replace(",", "")) - float(check.expected)) <= check.tolerance


def _choice(check: AnswerRule, answer: str) -> bool:
    """The answer names the expected letter and no other: where it says "the answer is" or "is
    correct", that one; else the letter alone at the start of a line.
    """
    text = _MARKDOWN.sub("", answer).strip()
    if only := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return only[1].upper() == check.expected.upper()
    named = {one or other for one, other in _NAMED.findall(text)} - {"a", "i"}
    named |= set(_CORRECT.findall(text))
    found = {one.upper() for one in named} or set(_ALONE.findall(text)[:1])
    return found == {check.expected.upper()}


def _json(check: AnswerRule, answer: str) -> bool:
    """The answer, or the one fenced block in it, is JSON that the expected schema accepts."""
    fenced = _FENCED.findall(answer)
    try:
        value = json.loads(fenced[0] if len(fenced) == 1 else answer)
        jsonschema.validate(value, check.expected)
    except (ValueError, RecursionError, jsonschema.exceptions.ValidationError):
        return False
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(map(_is_text, texts))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_schema(value: Any) -> bool:
    try:
        jsonschema.Draft202012Validator.check_schema(value)
    except jsonschema.exceptions.SchemaError:
        return False
    return isinstance(value, dict | bool)


def _matches(check: AnswerRule, answer: str) -> bool:
    return bool(re.search(check.expected, answer, re.IGNORECASE if check.ignore_case else 0))


RULES: Mapping[str, RuleKind] = {
    "exact": RuleKind(
        "a text, or a list of which one must be the answer",
        _is_texts,
        lambda check, answer: _folded(check, answer) in _texts(check),
    ),
    "contains": RuleKind(
        "a text, or a list of which all must occur",
        _is_texts,
        lambda check, answer: all(text in _folded(check, answer) for text in _texts(check)),
    ),
    "excludes": RuleKind(
        "a text, or a list of which none may occur",
        _is_texts,
        lambda check, answer: not any(text in _folded(check, answer) for text in _texts(check)),
    ),
    "regex": RuleKind("a regular expression", _is_pattern, _matches),
    "number": RuleKind("a number", _is_number, _number),
    "choice": RuleKind(
        "a letter",
        lambda value: isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z]", value)),
        _choice,
    ),
    "json": RuleKind("a JSON Schema ({} accepts any JSON)", _is_schema, _json),
    "max_words": RuleKind(
        "a count", _is_count, lambda check, answer: len(answer.split()) <= check.expected
    ),
    "min_words": RuleKind(
        "a count", _is_count, lambda check, answer: len(answer.split()) >= check.expected
    ),
}
