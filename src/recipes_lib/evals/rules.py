"""Rules that an answer's text passes or fails, without leading and trailing space.

Also whether a set of rules sees the form of an answer alone.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from recipes_lib.core.errors import DataError

# A number as people write it: 1,234.5, -3, 2e-3. A sign counts only where no digit or letter stands
# before it: 2024-05-17 ends in 17, and 3-5 in 5.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?:(?<![\w.)\]])[-+])?\.\d+"
)
_MARKDOWN = re.compile(r"[*_`]+|\\boxed|\\text")
# "C", "(C)", "C.", "C) Paris", "C: Paris" at the start of a line
_ALONE = re.compile(r"^\W*([A-Z])(?:[).:,\]}]|\s*$|\s+[-\u2013\u2014])", re.MULTILINE)
# "the answer is C", "Answer: (C)", "option C", "It's C.", "I choose C", "... is C." at line end
_NAMED = re.compile(
    r"\b(?:answer|choice|option|it|choose|pick|select)\b"
    r"(?:['\u2019]s\b|\s+(?:is|would\s+be|was|must\s+be|should\s+be)\b|\s*[:-])?"
    r"(?:\s+(?:option|choice|answer|letter)\b)?\s*[({\[\"']*(?!i\s+[a-z])([A-Za-z])\b(?!['\u2019])"
    r"|\bis\s+([A-Z])\W*$",
    re.IGNORECASE | re.MULTILINE,
)
# "C is correct", "option C is the right one"
_CORRECT = re.compile(r"\b([A-Z])[)}\]\"']*\s+is\s+(?:the\s+)?(?:correct|right|best)\b")

_NEARLY_ALL = 0.9  # of the questions, that one answer passes
_FEWEST_QUESTIONS = 5  # of a set that says something about its checks
_TRIED = 20  # answers of each kind


_Text = Annotated[str, Field(pattern=r"\S")]
_TEXTS = TypeAdapter[Any](_Text | Annotated[list[_Text], Field(min_length=1)])
# what each check wants under `expected`
RULES: Mapping[str, TypeAdapter[Any]] = {
    "exact": _TEXTS,
    "contains": _TEXTS,
    "regex": TypeAdapter(Annotated[str, AfterValidator(re.compile)]),
    "number": TypeAdapter(int | float),
    "choice": TypeAdapter(Annotated[str, Field(pattern="^[A-Za-z]$")]),
}


class AnswerRule(BaseModel):
    """One rule of a row: the name of a check in RULES, what is expected, and how strictly."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    check: str
    expected: Any = None
    tolerance: float = Field(default=0.0, ge=0)

    def passes(self, answer: str) -> bool:
        """Whether an answer passes.

        Example:
            >>> AnswerRule(check="choice", expected="C").passes("The answer is **C**.")
            True
        """
        answer = answer.strip()
        if self.check == "regex":
            return bool(re.search(self.expected, answer))
        if self.check == "number":
            # U+2212 is the minus of typesetters
            numbers = _NUMBER.findall(answer.replace("\u2212", "-"))
            if not numbers:
                return False
            return abs(float(numbers[-1].replace(",", "")) - self.expected) <= self.tolerance
        if self.check == "choice":
            return _letters(answer) == {self.expected.upper()}
        texts = [text.strip() for text in self.expected_texts]
        if self.check == "exact":
            return answer in texts
        return all(text in answer for text in texts)

    @property
    def expected_texts(self) -> list[str]:
        """What is expected as texts; none of a regular expression, which is no answer."""
        if self.check == "regex":
            return []
        if isinstance(self.expected, list):
            return self.expected
        return [str(self.expected)]


def rule_of(written: Mapping[str, object]) -> AnswerRule:
    """Return a check of a row, or refuse one that cannot work."""
    name = str(written.get("check"))
    if name not in RULES:
        raise DataError(f"unknown check '{name}'", f"checks: {', '.join(RULES)}")
    try:
        RULES[name].validate_python(written.get("expected"), strict=True)
        return AnswerRule.model_validate(written)
    except (ValidationError, re.error):
        what = f"check '{name}' is not valid as written: {dict(written)}"
        raise DataError(what, "what each check takes: docs/evaluation.md") from None


def _letters(answer: str) -> set[str]:
    """The letters that an answer names ("the answer is C"), else one alone at a line's start."""
    text = _MARKDOWN.sub("", answer).strip()
    only_letter = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    if only_letter:
        return {only_letter[1].upper()}
    named = {first or second for first, second in _NAMED.findall(text)}
    named -= {"a", "i"}  # an article and a pronoun
    named |= set(_CORRECT.findall(text))
    if named:
        return {letter.upper() for letter in named}
    return set(_ALONE.findall(text)[:1])


def see_form_alone(checks: Sequence[Sequence[AnswerRule]], passing: Sequence[str]) -> bool:
    """Whether one and the same answer would pass the checks of nearly all questions, so that these
    cannot tell a good answer from a fixed one.

    Args:
        checks: those of each question.
        passing: answers that passed; they are tried, and what the checks expect.
    """
    if len(checks) < _FEWEST_QUESTIONS:
        return False
    num_questions_of = Counter(str(rules) for rules in checks)
    if max(num_questions_of.values()) >= _NEARLY_ALL * len(checks):
        return True
    expected = Counter[str]()
    for rules in checks:
        for rule in rules:
            expected.update(rule.expected_texts)
    candidates = [text for text, _ in expected.most_common(_TRIED)]
    candidates += list(dict.fromkeys(passing))[:_TRIED]
    may_fail = len(checks) - math.ceil(_NEARLY_ALL * len(checks))
    for text in candidates:
        num_failed = 0
        for rules in checks:
            num_failed += not all(rule.passes(text) for rule in rules)
            # most candidates have failed too often after a few questions
            if num_failed > may_fail:
                break
        else:
            return True
    return False
