"""The rules that an answer is checked by: what each wants under `expected`, and when it passes.

Rules read the answer's text alone, without leading and trailing space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema
import jsonschema.exceptions

# a number as people write it: 1,234.5, -3, 2e-3
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_FENCED = re.compile(r"```(?:\w+)?\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """One rule: the name of a check in RULES, what is expected, and how strictly."""

    name: str
    expected: Any
    ignore_case: bool = False
    tolerance: float = 0.0

    def passes(self, answer: str, cut: bool = False) -> bool | None:
        """Whether an answer passes; None where it was cut and more text could change that."""
        passed = RULES[self.name].passes(self, answer.strip())
        return None if cut and RULES[self.name].settled is not passed else passed


@dataclass(frozen=True)
class RuleKind:
    """What a check wants under `expected` (checked when the rows are read), and its rule.

    `settled` is the result that no further text of the answer can change; None if every can.
    """

    wants: str
    fits: Callable[[Any], bool]
    passes: Callable[[Rule, str], bool]
    settled: bool | None = None


def _folded(check: Rule, text: str) -> str:
    return text.casefold() if check.ignore_case else text


def _texts(check: Rule) -> list[str]:
    expected = check.expected if isinstance(check.expected, list) else [check.expected]
    return [_folded(check, text.strip()) for text in expected]


def _number(check: Rule, answer: str) -> bool:
    """The last number of the answer is the expected one, within the tolerance."""
    found = _NUMBER.findall(answer)
    if not found:
        return False
    return abs(float(found[-1].replace(",", "")) - float(check.expected)) <= check.tolerance


def _choice(check: Rule, answer: str) -> bool:
    """The answer names the expected letter, alone, before a mark or after "answer is"; no other."""
    first = re.match(r"\W*([A-Za-z])(?:[).:,]|\s*$|\s*\n)", answer)
    named = re.findall(r"(?:answer|choice|option)\s*(?:is|:)?\s*\(?([A-Za-z])\b", answer, re.I)
    found = {one.upper() for one in named} or ({first[1].upper()} if first else set())
    return found == {check.expected.upper()}


def _json(check: Rule, answer: str) -> bool:
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
        settled=True,
    ),
    "excludes": RuleKind(
        "a text, or a list of which none may occur",
        _is_texts,
        lambda check, answer: not any(text in _folded(check, answer) for text in _texts(check)),
        settled=False,
    ),
    "regex": RuleKind(
        "a regular expression",
        _is_pattern,
        lambda check, answer: bool(
            re.search(check.expected, answer, re.IGNORECASE if check.ignore_case else 0)
        ),
    ),
    "number": RuleKind("a number", _is_number, _number),
    "choice": RuleKind(
        "a letter",
        lambda value: isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z]", value)),
        _choice,
    ),
    "json": RuleKind("a JSON Schema ({} accepts any JSON)", _is_schema, _json),
    "max_words": RuleKind(
        "a count",
        _is_count,
        lambda check, answer: len(answer.split()) <= check.expected,
        settled=False,
    ),
    "min_words": RuleKind(
        "a count",
        _is_count,
        lambda check, answer: len(answer.split()) >= check.expected,
        settled=True,
    ),
}
