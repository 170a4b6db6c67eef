"""The only place that writes a comparison sentence. A sentence is a template filled with a tested
row; no template, no claim.

better / worse        Holm-adjusted p <= 0.05 and an interval without zero, whatever the unresolved
items would have been no difference shown   tested, and not that; the sentence says what difference
this comparison would have found cannot be tested      there are no items to pair, too few, or the
two arms are one model

A cause is named only where declared keys are all that differs between the values of two recipes,
the study trained both, several times or with a noise floor that the difference exceeds, and no
error was found. A confound that is only warned of (hardware, versions) takes the cause away, one
that is an error turns the sentence into an association; any other error stops it. The numbers stay
in the table either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.findings import (
    CONFOUNDED,
    INSIDE_NOISE,
    NOT_AUDITED,
    ONE_MODEL,
    Finding,
    errors_first,
)
from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.published import load_published
from recipes_lib.compare.published_rows import with_published
from recipes_lib.compare.table import (
    ALPHA,
    HALF,
    Score,
    TableRow,
    TestVerdict,
    build_rows,
    build_scores,
    corrected,
    json_value,
    largest_possible,
    pairs_of,
    with_flags,
)
from recipes_lib.compare.validity.case import (
    Case,
    changed,
    effective,
    setting_text,
    with_derived_values,
)
from recipes_lib.compare.validity.noise import noise_floors
from recipes_lib.compare.wording import (
    count,
    difference_text,
    interval_text,
    metric_text,
    p_text,
    question_text,
    sentence_list,
)

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.published import Published
    from recipes_lib.compare.validity.noise import Floor

ONE_RECIPE = "both are trainings of one recipe, and this is how far apart chance alone took them"
MOST_VALUES = 4  # of more keys that differ a sentence gives the names alone


@dataclass(frozen=True)
class Comparison:
    """What is known and what may be said: the answer in sentences, the table, the scores, and the
    findings that stand against it.
    """

    question: str
    answer: tuple[str, ...]
    rows: tuple[TableRow, ...]
    scores: tuple[Score, ...]
    findings: tuple[Finding, ...]
    tests: int
    alpha: float = ALPHA

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "question": self.question,
            "answer": list(self.answer),
            "alpha": self.alpha,
            "tests": self.tests,
            "findings": [json_value(dataclasses.asdict(finding)) for finding in self.findings],
            "rows": [row.to_dict() for row in self.rows],
            "scores": [json_value(dataclasses.asdict(score)) for score in self.scores],
        }

    def between(self, first: str, second: str) -> list[TableRow]:
        """Return the rows of one pair of arms."""
        return [row for row in self.rows if {row.first, row.second} == {first, second}]


def compare_arms(
    measurements: Measurements,
    findings: Iterable[Finding] = (),
    study: Study | None = None,
    published: Published | None = None,
) -> Comparison:
    """Return the table with its verdicts, and the sentences that follow from it.

    Args:
        findings: what `validity` found about these measurements.
        study: None for `recipes compare`, which knows no factor and therefore no cause.
        published: numbers to show beside ours; None for those that the study names.
    """
    if published is None and study is not None and study.published:
        published = load_published(study.published)
    known = tuple(errors_first(findings))
    base = [name for name, arm in measurements.arms.items() if arm.is_base or name == "base"]
    scores = build_scores(measurements)
    rows = build_rows(measurements, base)
    if published is not None:
        place = {
            frozenset(pair): number for number, pair in enumerate(pairs_of(measurements, base))
        }
        rows = sorted(
            with_published(rows, scores, measurements, published),
            key=lambda row: place[frozenset(row.arms)],
        )
    one_model = [
        dataclasses.replace(row, reason=_one_model(row, known) or row.reason) for row in rows
    ]
    tested = corrected(one_model)
    tests = sum(row.p_holm is not None for row in tested)
    case = Case(study, measurements)
    causes = Causes(
        study,
        case.values,
        noise_floors(case),
        ALPHA / max(1, tests),
        tuple(base),
    )
    judged = [judge_row(with_flags(row, measurements), known, causes) for row in tested]
    question = (
        question_text(study.question)
        if study
        else f"How do {sentence_list(list(measurements.arms))} compare?"
    )
    answer = answer_paragraph(judged, base) if judged else nothing_compared(measurements, known)
    return Comparison(question, answer, tuple(judged), tuple(scores), known, tests)


def _one_model(row: TableRow, findings: Sequence[Finding]) -> str:
    """Why the two arms of a row are the same thing under two names, or nothing."""
    same = [
        finding
        for finding in findings
        if finding.code.startswith(ONE_MODEL) and finding.severity == "error"
    ]
    titles = [
        finding.title
        for finding in same
        if len(set(finding.arms) & set(row.arms)) == 2 and finding.touches(row.arms, row.metric)
    ]
    return _lower(titles[0]).rstrip(".") if titles else ""


def verdict_of(row: TableRow) -> TestVerdict:
    """Return what the test of a row shows."""
    if row.tested is None or row.reason or row.difference is None:
        return "cannot be tested"
    low, high = row.tested.low, row.tested.high
    with_zero = (
        low is None or high is None or low <= 0 <= high
    )  # bootstrap and permutation test may disagree at the edge: both must agree
    if row.p_holm is None or row.p_holm > ALPHA or row.difference == 0 or with_zero:
        return "no difference shown"
    return "better" if (row.difference > 0) == row.higher_is_better else "worse"


def judge_row(row: TableRow, findings: Sequence[Finding], causes: Causes) -> TableRow:
    """Return a row with its verdict, the findings that stop its claim, and its sentence."""
    row = dataclasses.replace(row, verdict=verdict_of(row))
    mine = [finding for finding in findings if finding.touches(row.arms, row.metric)]
    errors = [finding for finding in mine if finding.severity == "error"]
    unaudited = [finding for finding in errors if finding.code == NOT_AUDITED]
    stops = [
        finding
        for finding in errors
        if not finding.code.startswith(CONFOUNDED) and finding not in unaudited
    ]
    confounds = [finding for finding in mine if finding.code.startswith(CONFOUNDED)]
    row = dataclasses.replace(row, stopped=tuple(finding.title for finding in errors))
    because = ""
    if row.verdict == "cannot be tested":
        sentence, because = untestable_sentence(row), row.reason
    elif stops:
        because = _reasons(stops)
        sentence = stopped_sentence(row, because)
    elif unaudited:
        because = _reasons(unaudited)
        sentence = preference_sentence(row, because)
    elif row.verdict == "no difference shown":
        sentence = no_difference_sentence(row)
    elif errors:
        because = _reasons([finding for finding in confounds if finding in errors])
        sentence = association_sentence(row, because)
    elif causes.one_recipe(row) and not confounds:
        row, because = dataclasses.replace(row, stopped=(ONE_RECIPE,)), ONE_RECIPE
        sentence = chance_sentence(row)
    else:
        sentence = difference_sentence(row) + causes.sentence(row, mine)
    return dataclasses.replace(row, sentence=sentence, because=because)


# ---- Templates ----


def numbers_text(row: TableRow) -> str:
    """The numbers of a tested row: effect, interval, p and n, and the unresolved items where there
    are any.
    """
    tested = row.tested
    assert tested is not None
    if row.head_to_head:
        low, high = (None if limit is None else HALF + limit for limit in (tested.low, tested.high))
        effect = (
            f"win rate {metric_text(row.first_value, 'share')}"
            f" {interval_text(low, high, 'share', signed=False)}"
        )
    else:
        values = (
            f"{metric_text(row.first_value, row.unit)} against"
            f" {metric_text(row.second_value, row.unit)}"
        )
        effect = (
            f"{values}, difference {difference_text(row.difference, row.unit)}"
            f" {interval_text(tested.low, tested.high, row.unit)}"
        )
    size = (
        count(tested.questions, "question")
        if tested.questions == tested.n
        else f"{tested.n:,} items of {tested.questions:,} questions"
    )
    parts = [effect.replace(" n/a", ""), f"{p_text(row.p_holm)} (Holm)", f"n = {size}"]
    if tested.seeds > 1:
        parts.append(f"{tested.seeds} seeds")
    if tested.unresolved:
        parts.append(f"{tested.unresolved:,} without a verdict counted both ways")
    return ", ".join(parts)


def _where(row: TableRow) -> str:
    """The metric of a row, in a sentence."""
    against = f" against {row.opponent}" if row.opponent else ""
    return f"{row.label}, head to head" if row.head_to_head else f"{row.label}{against}"


def difference_sentence(row: TableRow) -> str:
    """Template of a shown difference."""
    return f"{row.first} is {row.verdict} than {row.second} on {_where(row)}: {numbers_text(row)}."


def chance_sentence(row: TableRow) -> str:
    """Template of a shown difference between trainings of one recipe, of which neither is better
    for a reason.
    """
    higher = "higher" if (row.difference or 0) > 0 else "lower"
    return (
        f"{row.first} came out {higher} than {row.second} on {_where(row)}: {numbers_text(row)}. No"
        f" effect is claimed: {ONE_RECIPE}."
    )


def no_difference_sentence(row: TableRow) -> str:
    """Template of a difference that was not shown, with what would have been."""
    power = ""
    if row.mde is not None:
        power = (
            f" A true difference of {_size(row.mde, row.unit)} would have been found with 80%"
            " probability."
        )
        if row.mde > largest_possible(row):
            power = " No difference, however large, would have been found with 80% probability."
    needed = ""
    if row.needed and row.tested and row.needed > row.tested.questions:
        needed = f" The observed one would need about {count(row.needed, 'question')}."
    return (
        f"No difference shown between {row.first} and {row.second} on {_where(row)}:"
        f" {numbers_text(row)}.{power}{needed}"
    )


def untestable_sentence(row: TableRow) -> str:
    """Template of a comparison that cannot be made."""
    return f"{row.first} and {row.second} cannot be compared on {_where(row)}: {row.reason}."


def stopped_sentence(row: TableRow, because: str) -> str:
    """Template of a claim that an error stopped."""
    return f"No claim about {row.first} and {row.second} on {_where(row)}: {because}."


def preference_sentence(row: TableRow, because: str) -> str:
    """Template of what a judge says whose audit is not whole: its preference, and no claim about
    the answers.
    """
    more = {"better": "more", "worse": "less"}.get(row.verdict)
    said = (
        f"preferred {row.first} {more} than {row.second}"
        if more
        else f"showed no preference between {row.first} and {row.second}"
    )
    return (
        f"The judge {said} on {_where(row)}: {numbers_text(row)}. No claim about the answers"
        f" follows: {because}."
    )


def association_sentence(row: TableRow, because: str) -> str:
    """Template of a shown difference whose cause cannot be told."""
    higher = "higher" if (row.difference or 0) > 0 else "lower"
    return (
        f"{row.first} scored {higher} than {row.second} on {_where(row)}: {numbers_text(row)}. "
        f"This is an association, not an effect: {because}."
    )


@dataclass(frozen=True)
class Causes:
    """What may be said about the cause of a shown difference; the only place that says it.

    Args:
        study: None where no factor is declared.
        values: the resolved values of every arm.
        floors: noise floors by metric and opponent.
        alpha: level at which a difference must exceed its noise floor: 5% over all tests of the
            table.
        base: arms without a training.
    """

    study: Study | None
    values: Mapping[str, Mapping[str, Any]]
    floors: Mapping[tuple[str, str | None], Floor]
    alpha: float
    base: tuple[str, ...] = ()

    def one_recipe(self, row: TableRow) -> bool:
        """Whether both arms are trainings of one recipe (an A/A pair), as the study says or,
        without one, as both runs recorded it.
        """
        known = (
            self._knows(row) if self.study else set(row.arms) <= self.values.keys() - set(self.base)
        )
        return known and not changed(self.study, self.values[row.first], self.values[row.second])

    def _knows(self, row: TableRow) -> bool:
        """Whether the study trained both arms, and so knows all that differs between them."""
        trained = {arm.name for arm in self.study.arms if arm.trained} if self.study else set()
        return set(row.arms) <= (trained - set(self.base)) & self.values.keys()

    def sentence(self, row: TableRow, findings: Sequence[Finding]) -> str:
        """Return the template that fits, or nothing between arms of which a study did not train
        both.

        Args:
            findings: those that touch the row, without errors.
        """
        if not self._knows(row):
            return ""
        keys = changed(self.study, self.values[row.first], self.values[row.second])
        confounds = [finding for finding in findings if finding.code.startswith(CONFOUNDED)]
        inside = [finding for finding in findings if finding.code == INSIDE_NOISE]
        undeclared = [key for key, factor in keys.items() if factor is None]
        if confounds or undeclared:
            return (
                " No cause is named:"
                f" {_reasons(confounds) or f'no factor declares {sentence_list(undeclared)}'}."
            )
        if inside:
            return f" No cause is named: {_reasons(inside)}."
        differ, their = (
            ("differs", "its effect") if len(keys) == 1 else ("differ", "their joint effect")
        )
        only = (
            f" Only {sentence_list(self._with_values(row, list(keys)))} {differ} between them, so"
            f" this is {their}"
        )
        if row.tested and row.tested.seeds > 1:
            return f"{only} over {row.tested.seeds} training seeds."
        floor = None if row.head_to_head else self.floors.get((row.metric, row.opponent))
        limit = floor.limit(1, 1, self.alpha) if floor else None
        if limit is not None and abs(row.difference or 0.0) > limit:
            chance = f"(estimated from {floor}, at 5% over all tests of this table)"
            return (
                f"{only}: two trainings of one recipe differ by no more than"
                f" {_size(limit, row.unit)} {chance}."
            )
        kept_apart = sentence_list([*self._with_values(row, list(keys)), "chance"])
        return (
            f" These two trainings differ, one of each arm; which of {kept_apart} is the cause, two"
            " trainings cannot tell."
        )

    def _with_values(self, row: TableRow, keys: Sequence[str]) -> list[str]:
        """Every key that differs, with both values where they are few enough to read."""
        if len(keys) > MOST_VALUES:
            return list(keys)
        one, other = with_derived_values(self.values[row.first], self.values[row.second])
        return [
            f"{key} ({setting_text(effective(key, one))} against"
            f" {setting_text(effective(key, other))})"
            for key in keys
        ]


def answer_paragraph(rows: Sequence[TableRow], base: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the answer: for each pair of arms what the table holds for it, with the sentence of
    its first comparison.
    """
    pairs = list(dict.fromkeys(row.arms for row in rows))
    own = [pair for pair in pairs if not set(pair) & set(base)]
    sentences: list[str] = []
    given: set[str] = set()  # reasons that were given
    for pair in own or pairs:
        mine = [row for row in rows if row.arms == pair]
        chosen = [mine[0], *[row for row in mine[1:] if row.verdict in ("better", "worse")][:3]]
        sentences.append(summary_sentence(mine))
        for row in chosen:
            if row.because not in given:
                sentences.append(row.sentence)
            elif row.verdict != "cannot be tested" and not row.sentence.startswith(
                "No claim about"
            ):
                sentences.append(
                    f"{_without_reasons(row)}, for the reasons above."
                )  # it holds numbers besides
            given |= {row.because} - {""}
    if own:
        sentences += [
            summary_sentence([row for row in rows if row.arms == pair])
            for pair in pairs
            if pair not in own
        ]
    return tuple(sentences)


def _without_reasons(row: TableRow) -> str:
    return row.sentence.removesuffix(f": {row.because}.")


def remaining_sentences(
    rows: Sequence[TableRow], said: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """Return the sentences of a table that its answer does not hold, as (reasons, sentences): those
    with the same reasons stand together.

    The reasons are empty for sentences that need none, and for a single one that holds its own.
    """
    found: dict[str, list[TableRow]] = {}
    for row in rows:
        if row.sentence not in said:
            found.setdefault(row.because, []).append(row)
    return [
        (
            (because, [_without_reasons(row) + "." for row in mine])
            if because and len(mine) > 1
            else ("", [row.sentence for row in mine])
        )
        for because, mine in found.items()
    ]


def nothing_compared(measurements: Measurements, findings: Sequence[Finding]) -> tuple[str, ...]:
    """Return the answer where no two arms have a metric in common: for each pair the errors that
    stand against its losses and times.
    """
    names = [name for name, arm in measurements.arms.items() if arm.runs]
    if not names:
        return ("Nothing is measured yet.",)
    sentences = ["Nothing can be compared: no two arms have a metric in common."]
    for position, second in enumerate(names):
        for first in names[:position]:
            errors = [
                one
                for one in findings
                if one.severity == "error" and {first, second} <= set(one.arms)
            ]
            if errors:
                sentences.append(
                    f"Losses and times of {first} and {second} are no comparison either:"
                    f" {_reasons(errors)}."
                )
    return tuple(sentences)


def summary_sentence(rows: Sequence[TableRow]) -> str:
    """Template that counts the verdicts of one pair of arms; a claim that an error stopped is
    counted as stopped.
    """
    first, second = rows[0].arms
    stopped = [row for row in rows if row.stopped and row.verdict != "cannot be tested"]
    one_recipe = sum(row.because == ONE_RECIPE for row in rows)
    counts = {
        "better on": sum(row.verdict == "better" and not row.stopped for row in rows),
        "worse on": sum(row.verdict == "worse" and not row.stopped for row in rows),
        "no difference shown on": sum(
            row.verdict == "no difference shown" and not row.stopped for row in rows
        ),
        "no claim (an error was found) on": len(stopped) - one_recipe,
        "no claim (one recipe, trained twice) on": one_recipe,
        "cannot be tested on": sum(row.verdict == "cannot be tested" for row in rows),
    }
    said = [(words, n) for words, n in counts.items() if n]
    if len(rows) == 1:
        return f"{first} against {second}, 1 comparison: {said[0][0].removesuffix(' on')}."
    if len(said) == 1:
        every = "all" if said[0][0] in ("better on", "worse on") else "any of the"
        return f"{first} against {second}: {said[0][0]} {every} {len(rows)} comparisons."
    said_first = f"{said[0][0]} {said[0][1]} of {len(rows)} comparisons"
    return (
        f"{first} against {second}:"
        f" {', '.join([said_first, *(f'{words} {n}' for words, n in said[1:])])}."
    )


def _reasons(findings: Sequence[Finding]) -> str:
    """The titles of findings as a clause; beyond three, their number."""
    titles = list(dict.fromkeys(_lower(finding.title).rstrip(".") for finding in findings))
    more = f"; and {len(titles) - 3} more" if len(titles) > 3 else ""
    return "; ".join(titles[:3]) + more


def _lower(title: str) -> str:
    """A title inside a sentence: its first letter small, unless its first word is a name or an
    abbreviation.
    """
    word = title.split(" ", 1)[0]
    return title[:1].lower() + title[1:] if word[:1].isupper() and word[1:].islower() else title


def _size(value: float, unit: str) -> str:
    """A difference without a sign."""
    return difference_text(value, unit).lstrip("+")
