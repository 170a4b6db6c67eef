"""Answers checked by rules over rows of your own: no judge, one answer per row.

A row is a prompt with what the answer must be. `data.questions` names a file of such rows (JSON
lines or JSON):

    {"prompt": "What is the capital of France?", "check": "contains", "expected": "Paris"}
    {"prompt": "6 x 7?", "check": "number", "expected": 42, "category": "sums"}
    {"prompt": "A city as JSON.", "checks": [{"check": "json", "expected": {"required": ["name"]}},
                                             {"check": "max_words", "expected": 20}]}

An answer passes if it passes every check of its row. Rules read the answer's text alone, without
leading and trailing space; an answer that was cut and fails, fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jsonschema
import jsonschema.exceptions
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recipes_lib.config.documents import did_you_mean
from recipes_lib.core.errors import DataError
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.log import EvalLog, Sample
from recipes_lib.evals.suites import Suite
from recipes_lib.evals.verdicts import Rate, metric_of, shown_rate

if TYPE_CHECKING:
    from recipes_lib.evals.answers import Answers

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


class Checks(Suite):
    """The checks of one eval recipe's rows."""

    title = "checks"

    def log(self, answers: Answers) -> EvalLog:
        """Return the log of one model's answers."""
        samples = [
            _sample(question, answers, draw)
            for draw in range(1, answers.draws + 1)
            for question in self.chosen.questions
        ]
        label = f"answers that pass on {self.recipe.name}"
        return EvalLog(
            suite=self.recipe.suite.name,
            eval=self.recipe.name,
            n=len(self.chosen.questions),
            metrics=(metric_of("pass_rate", label, samples),),
        )

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs: all rows, then category by category where there are
        several.
        """
        by_log = [log.metrics[0].samples for log in logs]
        categories = dict.fromkeys(sample.category for samples in by_log for sample in samples)
        rows = [["answers that pass [95%]", "n", *(log.target for log in logs)]]
        names = {"": "all", "all": "no category"}
        for name in ("", *(categories if len(categories) > 1 else ())):
            cells = [
                [sample for sample in samples if name in ("", sample.category)]
                for samples in by_log
            ]
            values = [shown_rate(Rate.of(samples)) for samples in cells]
            rows.append([names.get(name, name), str(max(map(len, cells))), *values])
        return aligned(rows)


def _sample(question: Any, answers: Answers, draw: int) -> Sample:
    """One answer's sample: 1 if it passes every check, else 0."""
    text = answers.text(question.id, draw=draw)
    failed = [rule.check for rule in question.checks if not rule.passes(text)]
    return Sample(
        id=question.id,
        draw=draw,
        category=question.category,
        value=float(not failed),
        outcome="graded",
        verdicts=(f"fails {', '.join(failed)}" if failed else "passes",),
        raws=(None,),
        by_rule=True,
        lengths=(len(text),),
        cut=answers.is_cut(question.id, draw=draw),
        input=question.turns[0],
        answer=text,
    )


# ---- rules ----


class AnswerRule(BaseModel):
    """One rule of a row: the name of a check in RULES, what is expected, and how strictly."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    check: str
    expected: Any = None
    ignore_case: bool = False
    tolerance: float = Field(default=0.0, ge=0)

    def passes(self, answer: str) -> bool:
        """Whether an answer passes.

        Example:
            >>> AnswerRule(check="choice", expected="C").passes("The answer is **C**.")
            True
        """
        return RULES[self.check].passes(self, answer.strip())

    def folded(self, text: str) -> str:
        """Return a text as it is compared."""
        return text.casefold() if self.ignore_case else text

    @property
    def texts(self) -> list[str]:
        """The expected texts as they are compared."""
        expected = self.expected if isinstance(self.expected, list) else [self.expected]
        return [self.folded(text.strip()) for text in expected]


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
    name = str(written.get("check") or "")
    if name not in RULES:
        hints = (*did_you_mean(name, list(RULES)), f"checks: {', '.join(RULES)}")
        what = f"unknown check '{name}'" if name else "a row needs a 'check', or a list of 'checks'"
        raise DataError(what, *hints)
    try:
        rule = AnswerRule.model_validate(written)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        where = ".".join(map(str, details["loc"]))
        raise DataError(f"check '{name}': {where}: {details['msg']}") from None
    if not RULES[name].fits(rule.expected):
        raise DataError(f"check '{name}' expects {RULES[name].wants}, not {rule.expected!r}")
    return rule


def _number(rule: AnswerRule, answer: str) -> bool:
    """The last number of the answer is the expected one, within the tolerance."""
    numbers = _NUMBER.findall(answer.replace("\u2212", "-"))  # the minus of typesetters
    if not numbers:
        return False
    return abs(float(numbers[-1].replace(",", "")) - float(rule.expected)) <= rule.tolerance


def _choice(rule: AnswerRule, answer: str) -> bool:
    """The answer names the expected letter and no other: where it says "the answer is" or "is
    correct", that one; else the letter alone at the start of a line.
    """
    text = _MARKDOWN.sub("", answer).strip()
    if only := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return only[1].upper() == rule.expected.upper()
    named = {first or second for first, second in _NAMED.findall(text)} - {"a", "i"}
    named |= set(_CORRECT.findall(text))
    letters = {letter.upper() for letter in named} or set(_ALONE.findall(text)[:1])
    return letters == {rule.expected.upper()}


def _json(rule: AnswerRule, answer: str) -> bool:
    """The answer, or the one fenced block in it, is JSON that the expected schema accepts."""
    fenced = _FENCED.findall(answer)
    try:
        value = json.loads(fenced[0] if len(fenced) == 1 else answer)
        jsonschema.validate(value, rule.expected)
    except (ValueError, RecursionError, jsonschema.exceptions.ValidationError):
        return False
    return True


def _matches(rule: AnswerRule, answer: str) -> bool:
    return bool(re.search(rule.expected, answer, re.IGNORECASE if rule.ignore_case else 0))


def _is_texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_letter(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z]", value))


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
        lambda rule, answer: rule.folded(answer) in rule.texts,
    ),
    "contains": RuleKind(
        "a text, or a list of which all must occur",
        _is_texts,
        lambda rule, answer: all(text in rule.folded(answer) for text in rule.texts),
    ),
    "excludes": RuleKind(
        "a text, or a list of which none may occur",
        _is_texts,
        lambda rule, answer: not any(text in rule.folded(answer) for text in rule.texts),
    ),
    "regex": RuleKind("a regular expression", _is_pattern, _matches),
    "number": RuleKind("a number", _is_number, _number),
    "choice": RuleKind("a letter", _is_letter, _choice),
    "json": RuleKind("a JSON Schema ({} accepts any JSON)", _is_schema, _json),
    "max_words": RuleKind(
        "a count", _is_count, lambda rule, answer: len(answer.split()) <= rule.expected
    ),
    "min_words": RuleKind(
        "a count", _is_count, lambda rule, answer: len(answer.split()) >= rule.expected
    ),
}
