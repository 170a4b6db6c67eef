"""Answers checked by rules over rows of your own: no judge, one answer per row.

An answer passes if it passes every check of its row (docs/evaluation.md has examples). Rules read
the answer's text alone, without leading and trailing space.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from recipes_lib.core.errors import DataError
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.log import FORM_ONLY, UNRESOLVED, EvalLog, Sample
from recipes_lib.evals.suites import Suite, metric_of, shown_rate

if TYPE_CHECKING:
    from recipes_lib.evals.answers import Answers
    from recipes_lib.evals.questions import Question

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


class Checks(Suite):
    """The checks of one eval recipe's rows."""

    title = "checks"

    def log(self, answers: Answers) -> EvalLog:
        """Return the log of one model's answers."""
        samples = []
        for question in self.chosen.questions:
            text = answers.text((question.id, 1))
            if text is None:
                samples.append(_without_answer(question, answers.unanswered[question.id, 1]))
                continue
            failed = [rule.check for rule in question.checks if not rule.passes(text)]
            sample = Sample(
                id=question.id,
                category=question.category,
                value=float(not failed),
                outcome="graded",
                verdicts=(f"fails {', '.join(failed)}" if failed else "passes",),
                by_rule=True,
                cut=(question.id, 1) in answers.cut,
                input=question.turns[0],
                answer=text,
            )
            samples.append(sample)
        label = f"pass rate on {self.recipe.name}"
        rate = metric_of("pass_rate", label, samples)
        notes = []
        passing = [str(sample.answer) for sample in samples if sample.value]
        if see_form_alone([question.checks for question in self.chosen.questions], passing):
            notes.append(FORM_ONLY)
        return self.new_log([rate], n=len(self.chosen.questions), notes=tuple(notes))

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        rates = [[log.target, str(log.n), shown_rate(log.metrics[0])] for log in logs]
        return aligned([["model", "n", "pass rate [95%]"], *rates])


def _without_answer(question: Question, reason: str) -> Sample:
    """What is known of a question that will never be answered: nothing passes, nothing fails."""
    return Sample(
        id=question.id,
        category=question.category,
        outcome=UNRESOLVED,
        verdicts=(f"no answer: {reason}",),
        by_rule=True,
        input=question.turns[0],
    )


# ---- rules ----


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
        answer, expected = answer.strip(), self.expected
        match self.check:
            case "regex":
                return bool(re.search(expected, answer))
            case "number":
                numbers = _NUMBER.findall(answer.replace("\u2212", "-"))  # the minus of typesetters
                last = float(numbers[-1].replace(",", "")) if numbers else math.inf
                return abs(last - expected) <= self.tolerance
            case "choice":
                return _letters(answer) == {expected.upper()}
        texts = [text.strip() for text in (expected if isinstance(expected, list) else [expected])]
        if self.check == "exact":
            return answer in texts
        return all(text in answer for text in texts)


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


def see_form_alone(checks: Sequence[Sequence[AnswerRule]], passing: Sequence[str]) -> bool:
    """Whether one and the same answer would pass the checks of nearly all questions, so that these
    cannot tell a good answer from a fixed one.

    Args:
        checks: those of each question.
        passing: answers that passed; they are tried, and what the checks expect.
    """
    if len(checks) < _FEWEST_QUESTIONS:
        return False
    alike = Counter(str(rules) for rules in checks)
    if alike.most_common(1)[0][1] >= _NEARLY_ALL * len(checks):
        return True
    expected = Counter(text for rules in checks for text in _expected_texts(rules))
    candidates = [text for text, _ in expected.most_common(_TRIED)]
    candidates += list(dict.fromkeys(passing))[:_TRIED]
    return any(_passes_nearly_all(text, checks) for text in candidates)


def _expected_texts(rules: Sequence[AnswerRule]) -> list[str]:
    """The texts that checks of one question name, which an answer could always be."""
    texts: list[str] = []
    for rule in rules:
        if rule.check == "regex":
            continue
        expected = rule.expected
        if not isinstance(expected, list):
            expected = [expected]
        texts += map(str, expected)
    return texts


def _passes_nearly_all(text: str, checks: Sequence[Sequence[AnswerRule]]) -> bool:
    """Whether a text passes the checks of nearly all questions."""
    may_fail = len(checks) - math.ceil(_NEARLY_ALL * len(checks))
    num_failed = 0
    for rules in checks:
        if not all(rule.passes(text) for rule in rules):
            num_failed += 1
        if num_failed > may_fail:
            return False
    return True


def _letters(answer: str) -> set[str]:
    """The letters that an answer names ("the answer is C"), else one alone at a line's start."""
    text = _MARKDOWN.sub("", answer).strip()
    if only := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return {only[1].upper()}
    named = {first or second for first, second in _NAMED.findall(text)} - {"a", "i"}
    named |= set(_CORRECT.findall(text))
    return {letter.upper() for letter in named} or set(_ALONE.findall(text)[:1])
