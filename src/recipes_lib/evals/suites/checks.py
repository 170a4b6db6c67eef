"""Answers checked by rules over rows of your own: no judge, one answer per row.

An answer passes if it passes every check of its row (docs/evaluation.md has examples). Rules read
the answer's text alone, without leading and trailing space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import jsonschema
import jsonschema.exceptions
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from recipes_lib.config.documents import did_you_mean
from recipes_lib.core.errors import DataError
from recipes_lib.core.terminal import aligned
from recipes_lib.evals.log import EvalLog, Sample
from recipes_lib.evals.suites import Suite
from recipes_lib.evals.verdicts import metric_of, shown_rate

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
        """Return the lines of a table of logs: all rows, then each of several categories."""
        by_log = [log.metrics[0].samples for log in logs]
        categories = dict.fromkeys(sample.category for samples in by_log for sample in samples)
        rows = [["answers that pass [95%]", "n", *(log.target for log in logs)]]
        names = {"": "all", "all": "no category"}
        for name in ("", *(categories if len(categories) > 1 else ())):
            cells = [
                [sample for sample in samples if name in ("", sample.category)]
                for samples in by_log
            ]
            values = [shown_rate(metric_of("pass_rate", "", samples)) for samples in cells]
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
        answer = answer.strip()
        match self.check:
            case "regex":
                return bool(re.search(self.expected, answer, re.I if self.ignore_case else 0))
            case "number":
                return _has_number(answer, self.expected, self.tolerance)
            case "choice":
                return _letters(answer) == {self.expected.upper()}
            case "json":
                return _is_json(answer, self.expected)
            case "max_words":
                return len(answer.split()) <= self.expected
            case "min_words":
                return len(answer.split()) >= self.expected
        texts = self.expected if isinstance(self.expected, list) else [self.expected]
        texts = [text.strip() for text in texts]
        if self.ignore_case:
            answer, texts = answer.casefold(), [text.casefold() for text in texts]
        match self.check:
            case "exact":
                return answer in texts
            case "contains":
                return all(text in answer for text in texts)
        return not any(text in answer for text in texts)


def rule_of(written: Mapping[str, object]) -> AnswerRule:
    """Return a check of a row, or refuse one that cannot work."""
    name = str(written.get("check") or "")
    if name not in RULES:
        hints = (*did_you_mean(name, list(RULES)), f"checks: {', '.join(RULES)}")
        what = f"unknown check '{name}'" if name else "a row needs a 'check', or a list of 'checks'"
        raise DataError(what, *hints)
    wants, expected = RULES[name]
    try:
        expected.validate_python(written.get("expected"), strict=True)
    except (ValidationError, re.error, jsonschema.exceptions.SchemaError):
        what = f"check '{name}' expects {wants}, not {written.get('expected')!r}"
        raise DataError(what) from None
    try:
        return AnswerRule.model_validate(written)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        where = ".".join(map(str, details["loc"]))
        raise DataError(f"check '{name}': {where}: {details['msg']}") from None


def _has_number(answer: str, expected: float, tolerance: float) -> bool:
    """Whether the last number of an answer is the expected one."""
    numbers = _NUMBER.findall(answer.replace("\u2212", "-"))  # the minus of typesetters
    return bool(numbers) and abs(float(numbers[-1].replace(",", "")) - expected) <= tolerance


def _letters(answer: str) -> set[str]:
    """The letters that an answer names ("the answer is C"), else one alone at a line's start."""
    text = _MARKDOWN.sub("", answer).strip()
    if only := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return {only[1].upper()}
    named = {first or second for first, second in _NAMED.findall(text)} - {"a", "i"}
    named |= set(_CORRECT.findall(text))
    return {letter.upper() for letter in named} or set(_ALONE.findall(text)[:1])


def _is_json(answer: str, schema: Any) -> bool:
    """Whether an answer, or the one fenced block in it, is JSON that a schema accepts."""
    fenced = _FENCED.findall(answer)
    try:
        jsonschema.validate(json.loads(fenced[0] if len(fenced) == 1 else answer), schema)
    except (ValueError, RecursionError, jsonschema.exceptions.ValidationError):
        return False
    return True


# ---- what a row may expect ----


_Text = Annotated[str, Field(pattern=r"\S")]
_TEXTS = TypeAdapter[Any](_Text | Annotated[list[_Text], Field(min_length=1)])
_COUNT = TypeAdapter[Any](Annotated[int, Field(ge=0)])
_LETTER = TypeAdapter[Any](Annotated[str, Field(pattern="^[A-Za-z]$")])
_PATTERN = TypeAdapter[Any](Annotated[str, AfterValidator(re.compile)])
_check_schema = jsonschema.Draft202012Validator.check_schema
_SCHEMA = TypeAdapter[Any](Annotated[dict[str, Any] | bool, AfterValidator(_check_schema)])
# the checks that there are: what they want under `expected`, in words and as a type
RULES: Mapping[str, tuple[str, TypeAdapter[Any]]] = {
    "exact": ("a text, or a list of which one must be the answer", _TEXTS),
    "contains": ("a text, or a list of which all must occur", _TEXTS),
    "excludes": ("a text, or a list of which none may occur", _TEXTS),
    "regex": ("a regular expression", _PATTERN),
    "number": ("a number", TypeAdapter(int | float)),
    "choice": ("a letter", _LETTER),
    "json": ("a JSON Schema ({} accepts any JSON)", _SCHEMA),
    "max_words": ("a count", _COUNT),
    "min_words": ("a count", _COUNT),
}
