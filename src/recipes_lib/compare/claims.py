"""The only place that writes a comparison sentence. A sentence is a template filled with a tested
row; no template, no claim.

- better / worse: adjusted p <= 0.05 (`statistics/family.py`: the primary question first) and an
  interval without zero, whatever the unresolved items would have been
- no difference shown: tested, and not that; the sentence says what difference this comparison would
  have found
- equivalent, not worse, not better: with a margin, the same of its ends
- cannot be tested: there are no items to pair, too few, or the two arms are one model
- not tested: shown beside a comparison that answers the same question, as the mean of its group or
  another metric of its task

A cause is named only where declared keys are all that differs between the values of two recipes,
the study trained both, several times or with a noise floor that the difference exceeds, and no
error was found. A confound that is only warned of (hardware, versions) takes the cause away, one
that is an error turns the sentence into an association; any other error stops it. The numbers stay
in the table either way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from recipes_lib.compare.aims import Aims
from recipes_lib.compare.answers import (
    AnswerCounts,
    AnswerDifference,
    compare_answers,
    count_answers,
)
from recipes_lib.compare.design import TUNED, Study
from recipes_lib.compare.findings import (
    CONFOUNDED,
    FALSE_CLAIMS,
    INSIDE_NOISE,
    LONGER_ANSWERS,
    NOT_AUDITED,
    ONE_MODEL,
    Finding,
    errors_first,
    found,
)
from recipes_lib.compare.looks import Looks
from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.published import Published, load_published
from recipes_lib.compare.published_rows import with_published
from recipes_lib.compare.relabelling import Relabelling, VerdictOf
from recipes_lib.compare.row import ALPHA, TableRow, TestVerdict, Within, json_value, scale_of
from recipes_lib.compare.table import (
    Score,
    build_rows,
    build_scores,
    corrected,
    pairs_of,
    with_flags,
    with_margins,
    with_primary,
)
from recipes_lib.compare.validity.case import (
    Case,
    changed,
    effective,
    setting_text,
    tuned_alike,
    with_derived_values,
)
from recipes_lib.compare.validity.noise import Floor, noise_floors
from recipes_lib.compare.wording import (
    NONE,
    count,
    p_text,
    question_text,
    sentence_list,
)

# The verdict that a row gets, or what takes its place: its sentence. No template, no claim.
SENTENCES = {
    "difference": "{first} is {verdict} than {second} on {where}: {numbers}.",
    "no difference shown": (
        "No difference shown between {first} and {second} on {where}: {numbers}."
    ),
    # Of a comparison with a margin, where no difference was shown.
    "equivalent": "{first} and {second} are equivalent on {where}, within {margin}: {numbers}.",
    "not worse": "{first} is not worse than {second} on {where}, within {margin}: {numbers}.",
    "not better": "{second} is not worse than {first} on {where}, within {margin}: {numbers}.",
    "cannot be tested": "{first} and {second} cannot be compared on {where}: {because}.",
    "not tested": "{first} and {second} are not tested on {where}: {because}.",
    "stopped": "No claim about {first} and {second} on {where}: {because}.",
    # Of a judge whose audit is not whole: what it preferred, and no claim about the answers.
    "preference": "The judge preferred {first} {more} than {second} on {where}: {numbers}.",
    "no preference": (
        "The judge showed no preference between {first} and {second} on {where}: {numbers}."
    ),
    # Of a shown difference whose cause cannot be told.
    "association": "{first} scored {higher} than {second} on {where}: {numbers}.",
    # Of a shown difference between trainings of one recipe: neither is better for a reason.
    "one recipe": "{first} came out {higher} than {second} on {where}: {numbers}.",
}
# What follows it, whatever the kind of the row.
HEDGES = {
    "difference": "{cause}",
    "no difference shown": "{power}",
    **dict.fromkeys(("equivalent", "not worse", "not better"), "{of}"),
    **dict.fromkeys(
        ("preference", "no preference"), " No claim about the answers follows: {because}."
    ),
    "association": " This is an association, not an effect: {because}.",
    "one recipe": " No effect is claimed: {because}.",
}
ONE_RECIPE = "both are trainings of one recipe, and this is how far apart chance alone took them"
Relabel = Callable[[Sequence[TableRow], VerdictOf], Relabelling | None]
Weigh = Callable[[Sequence[TableRow]], tuple[list[TableRow], list[Finding]]]
# of the scale: what trainings of one recipe differ by, as a standard deviation, where none was
# measured
SEED_DEVIATIONS = (0.01, 0.03, 0.06)
MOST_VALUES = 4  # of more keys that differ a sentence gives the names alone


@dataclass(frozen=True)
class Comparison:
    """What is known and what may be said: the answer in sentences, the table, the scores, the
    findings that stand against it, and what is wrong with the arms' answers.
    """

    question: str
    answer: tuple[str, ...]
    rows: tuple[TableRow, ...]
    scores: tuple[Score, ...]
    findings: tuple[Finding, ...]
    tests: int
    alpha: float = ALPHA
    relabelling: Relabelling | None = None
    answers: tuple[AnswerCounts, ...] = ()
    answer_differences: tuple[AnswerDifference, ...] = ()
    looks: Looks | None = None

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain values, for JSON."""
        told = {"relabelling": self.relabelling, "looks": self.looks}
        values: dict[str, object] = {
            name: {**dataclasses.asdict(one), "sentence": one.sentence}
            for name, one in told.items()
            if one
        }
        values |= {
            "question": self.question,
            "answer": list(self.answer),
            "alpha": self.alpha,
            "tests": self.tests,
            "findings": json_value(self.findings),
            "rows": [row.to_dict() for row in self.rows],
            "scores": json_value(self.scores),
            "answers": json_value(self.answers),
        }
        if self.answer_differences:
            values["answer_differences"] = json_value(self.answer_differences)
        return values


def compare_arms(
    measurements: Measurements,
    findings: Iterable[Finding] = (),
    study: Study | None = None,
    published: Published | None = None,
    aims: Aims | None = None,
    relabel: Relabel | None = None,
    weigh: Weigh | None = None,
) -> Comparison:
    """Return the table with its verdicts, and the sentences that follow from it.

    Args:
        findings: what `validity` found about these measurements.
        study: None for `recipes compare`, which knows no factor and therefore no cause.
        published: numbers to show beside ours; None for those that the study names.
        aims: what is asked of the table; None for what the study asks.
        relabel: tells from the table what becomes of copies of it (`relabelling.relabelled`); where
            they hold too many claims, none is made. None to leave that out.
        weigh: gives every row the part of its level that this look at it has, and findings about
            looks (`study/ledger.py`). None where nobody else looks.
    """
    if published is None and study is not None and study.published:
        published = load_published(study.published)
    base = [name for name, arm in measurements.arms.items() if arm.is_base or name == "base"]
    scores = build_scores(measurements)
    aims = aims or (study.aims if study else Aims())
    rows = build_rows(measurements, base, aims)
    if published is not None:
        rows = with_published(rows, scores, measurements, published)
    rows, of_looks = weigh(rows) if weigh else (rows, [])
    known = tuple(errors_first([*findings, *of_looks]))
    one_model = [replace(row, reason=_one_model(row, known) or row.reason) for row in rows]
    place = {frozenset(pair): number for number, pair in enumerate(pairs_of(measurements, base))}
    tested = sorted(
        corrected(with_margins(with_primary(one_model, aims.primary), aims)),
        key=lambda row: (place[frozenset(row.arms)], not row.primary),
    )
    tests = sum(row.p_holm is not None for row in tested)
    case = Case(study, measurements)
    causes = Causes(case, noise_floors(case), ALPHA / max(1, tests), tuple(base))
    flagged = [with_flags(row, measurements) for row in tested]

    def verdict_of(row: TableRow) -> TableRow:
        return judge_row(row, known, causes)

    judged = list(map(verdict_of, flagged))
    own = relabel(judged, verdict_of) if relabel else None
    if own and own.too_often:
        known = tuple(errors_first([*known, found(FALSE_CLAIMS, [own.sentence])]))
        judged = list(map(verdict_of, flagged))
    question = f"How do {sentence_list(list(measurements.arms))} compare?"
    answer = answer_paragraph(judged, base)
    if not any(row.of_results for row in judged):
        answer += nothing_compared(measurements, known, judged)
    pairs = list(dict.fromkeys(row.arms for row in judged))
    return Comparison(
        question_text(study.question) if study else question,
        answer,
        tuple(judged),
        tuple(scores),
        known,
        tests,
        relabelling=own,
        answers=tuple(count_answers(measurements)),
        answer_differences=tuple(compare_answers(measurements, pairs)),
    )


def _one_model(row: TableRow, findings: Sequence[Finding]) -> str:
    """Why the two arms of a row are the same thing under two names, or nothing."""
    for one in findings:
        same = one.code.startswith(ONE_MODEL) and one.severity == "error"
        if same and set(row.arms) <= set(one.arms) and one.touches(row.arms, row.metric):
            return _reasons([one])
    return ""


def judge_row(row: TableRow, findings: Sequence[Finding], causes: Causes) -> TableRow:
    """Return a row with its verdict, the findings that stop its claim, and its sentence."""
    verdict = _verdict(row)
    row = replace(row, verdict=verdict, within=_within(row, verdict))
    mine = [one for one in findings if one.touches(row.arms, row.metric)]
    errors = [one for one in mine if one.severity == "error"]
    unaudited = [one for one in errors if one.code == NOT_AUDITED]
    confounds = [one for one in mine if one.code.startswith(CONFOUNDED)]
    stops = [one for one in errors if one not in unaudited and one not in confounds]
    because, template = "", str(row.verdict)
    if row.verdict in ("cannot be tested", "not tested"):
        because = row.reason or row.aside
    elif stops:
        template, because = "stopped", _reasons(stops)
    elif unaudited:
        shown = "preference" if row.verdict in ("better", "worse") else "no preference"
        template, because = shown, _reasons(unaudited)
    elif row.verdict == "no difference shown":
        template = row.within or template
        because = _reasons(confounds) if row.within else ""
    elif errors:
        template, because = "association", _reasons([one for one in errors if one in confounds])
    elif causes.one_recipe(row) and not confounds:
        template, because = "one recipe", ONE_RECIPE
    else:
        template = "difference"
    whole = {**SENTENCES, **row.sentences}[template] + HEDGES.get(template, "")
    sentence = whole.format(
        first=row.first,
        second=row.second,
        where=row.where,
        row=row,
        numbers=numbers_text(row) if row.tested else "",
        evidence=evidence_text(row) if row.tested else "",
        margin=row.margin_text,
        of=causes.reach(row, because),
        verdict=row.verdict_words,
        more="more" if row.verdict == "better" else "less",
        higher="higher" if (row.difference or 0) > 0 else "lower",
        because=because,
        power=_power_text(row),
        cause=causes.sentence(row, mine) if template == "difference" else "",
    )
    if template == "difference" and row.within:
        sentence += f" The difference lies within the margin of {row.margin_text}."
    if template not in ("cannot be tested", "not tested", "stopped"):
        sentence += "".join(f" {one.title}." for one in mine if one.code == LONGER_ANSWERS)
    stopped = [because] if template == "one recipe" else [one.title for one in errors]
    return replace(row, sentence=sentence, because=because, stopped=tuple(stopped))


def _verdict(row: TableRow) -> TestVerdict:
    """What the test of a row shows."""
    if row.tested is None or row.reason or row.difference is None:
        return "cannot be tested"
    if row.aside:
        return "not tested"
    # Bootstrap and permutation test may disagree at the edge: both must agree.
    low, high = row.tested.low, row.tested.high
    with_zero = low is None or high is None or low <= 0 <= high
    if row.p_holm is None or row.p_holm > ALPHA or row.difference == 0 or with_zero:
        return "no difference shown"
    return "better" if (row.difference > 0) == row.higher_is_better else "worse"


def _within(row: TableRow, verdict: TestVerdict) -> Within:
    """What a margin adds to a verdict: nothing that "better" or "worse" says already."""
    if row.margin is None or verdict not in ("better", "worse", "no difference shown"):
        return ""
    not_worse, not_better = (
        p is not None and p <= ALPHA for p in (row.p_not_worse, row.p_not_better)
    )
    if not_worse and not_better:
        return "equivalent"
    if verdict != "no difference shown":
        return ""
    return "not worse" if not_worse else "not better" if not_better else ""


# ---- Parts of sentences ----


def numbers_text(row: TableRow) -> str:
    """Return the numbers of a tested row: effect, interval, and what `evidence_text` holds."""
    limits = "" if row.limits == NONE else f" {row.limits}"
    return f"{row.words} {row.effect}{limits}, {evidence_text(row)}"


def evidence_text(row: TableRow) -> str:
    """Return what stands behind the effect of a tested row: p, n, unresolved items."""
    tested = row.tested
    assert tested is not None
    items = count(tested.questions, row.item)
    if tested.questions != tested.n:
        items = f"{tested.n:,} items of {tested.questions:,} questions"
    p = row.p_holm
    if row.within and row.verdict == "no difference shown":
        sides = {"not worse": [row.p_not_worse], "not better": [row.p_not_better]}
        both = [row.p_not_worse, row.p_not_better]
        p = max(one for one in sides.get(row.within, both) if one is not None)
    looks = ", over all looks" if row.level_share < 1 else ""
    parts = [f"{p_text(p)} (Holm{looks})", f"n = {items}"]
    if tested.seeds > 1:
        parts.append(f"{tested.seeds} seeds")
    if row.labels:
        alone = f"the judge alone: {row.judge_alone}"
        parts.append(f"corrected by {row.labels:,} human labels ({alone})")
    if tested.unresolved:
        parts.append(f"{tested.unresolved:,} without a verdict counted both ways")
    return ", ".join(parts)


def _power_text(row: TableRow) -> str:
    """What difference would have been found, and how many questions the observed one would need."""
    told = ""
    if row.mde is not None:
        real = f"A true difference of {row.size(row.mde)}"
        size = real if row.mde <= row.largest else "No difference, however large,"
        told += f" {size} would have been found with 80% probability."
    if row.needed and row.tested and row.needed > row.tested.questions:
        told += f" The observed one would need about {count(row.needed, row.item)}"
        # More questions alone do not tell what the judge is off by.
        labels = math.ceil(row.labels * row.needed / row.tested.questions)
        told += f" and {labels:,} human labels." if labels else "."
    if row.margin is not None:
        told += f" Within {row.margin_text} nothing is shown."
    return told


@dataclass(frozen=True)
class Causes:
    """What may be said about the cause of a shown difference; the only place that says it.

    Args:
        alpha: level at which a difference must exceed its noise floor: 5% over all tests of the
            table.
        base: arms without a training.
    """

    case: Case
    floors: Mapping[tuple[str, str | None, bool], Floor]
    alpha: float
    base: tuple[str, ...] = ()

    def _keys(self, row: TableRow) -> dict[str, str | None] | None:
        """Every key that can have made the difference, with its factor; None where the study did
        not train both arms.
        """
        study, values = self.case.study, self.case.values
        known = values.keys() - set(self.base)
        if study is not None:
            known &= {arm.name for arm in study.arms if arm.trained}
        if not known >= set(row.arms):
            return None
        return changed(study, values[row.first], values[row.second], row.of_results)

    def one_recipe(self, row: TableRow) -> bool:
        """Whether both arms are trainings of one recipe (an A/A pair)."""
        keys = self._keys(row)
        return keys is not None and all(factor == TUNED for factor in keys.values())

    def sentence(self, row: TableRow, findings: Sequence[Finding]) -> str:
        """Return the template that fits, or nothing between arms of which a study did not train
        both.

        Args:
            findings: those that touch the row, without errors.
        """
        keys = self._keys(row)
        if self.case.study is None or keys is None:
            return ""
        confounds = [one for one in findings if one.code.startswith(CONFOUNDED)]
        inside = [one for one in findings if one.code == INSIDE_NOISE]
        undeclared = [key for key, factor in keys.items() if factor is None]
        if confounds or undeclared or inside:
            none = f"no factor declares {sentence_list(undeclared)}" if undeclared else ""
            why = _reasons(confounds) or none or _reasons(inside)
            return f" No cause is named: {why}."
        own = [key for key, factor in keys.items() if factor != TUNED]
        named, tuned = self._with_values(row, own), self._tuned(row)
        differ, their = ("differs", "its") if len(own) == 1 else ("differ", "their joint")
        only = (
            f" Only {sentence_list(named)} {differ} between them{tuned}, so this is {their} effect"
        )
        if row.tested and row.tested.seeds > 1:
            return f"{only} over {row.tested.seeds} training seeds."
        key = row.metric, row.opponent, row.labels > 0
        floor = None if row.head_to_head else self.floors.get(key)
        limit = floor.limit(1, 1, self.alpha) if floor else math.inf
        if abs(row.difference or 0.0) > limit:
            return (
                f"{only}: two trainings of one recipe differ by no more than"
                f" {row.size(limit)} (estimated from {floor}, at 5% over all tests of this"
                " table)."
            )
        return (
            f" These two trainings differ, one of each arm{tuned}; which of"
            f" {sentence_list([*named, 'chance'])} is the cause, two trainings cannot"
            f" tell{self._by_chance(row, floor)}."
        )

    def _by_chance(self, row: TableRow, floor: Floor | None) -> str:
        """How often the seed alone makes two trainings differ as these do: for the deviation
        between trainings that was measured, else for some that occur.
        """
        scale, spread = scale_of(row.metric, row.unit), row.tested.spread if row.tested else None
        if spread is None or row.difference is None or (floor is None and scale is None):
            return ""
        if floor is not None:
            deviations, source = [floor.deviation], f", estimated from {floor}"
        else:
            assert scale is not None
            deviations, source = [(scale[1] - scale[0]) * part for part in SEED_DEVIATIONS], ""
        sizes = [row.size(one) for one in deviations]
        chances = [spread.by_chance(row.difference, one) for one in deviations]
        shares = [f"{100 * one:.0f}%" if one >= 0.005 else "under 1%" for one in chances]
        return (
            f" (where the seed moves a training by {' / '.join(sizes)} (SD{source}), chance alone"
            f" takes two of one recipe this far apart in {' / '.join(shares)} of the cases)"
        )

    def reach(self, row: TableRow, because: str) -> str:
        """Return what a claim within a margin does not say: of one training each it is no claim
        about others, and beside confounds none about a key.
        """
        one_each = row.tested and row.tested.seeds == 1 and self._keys(row) is not None
        told = " This is of these two trainings, one of each arm." if one_each else ""
        return told + (f" It says nothing of one key: {because}." if because else "")

    def _tuned(self, row: TableRow) -> str:
        """That each arm stands at its own best value of a grid, and at which."""
        one, other = (self.case.values[name] for name in row.arms)
        return "".join(
            f", each at its best {key} of {', '.join(map(setting_text, grid))}"
            f" ({setting_text(one.get(key))} against {setting_text(other.get(key))})"
            for key, grid in tuned_alike(one, other).items()
        )

    def _with_values(self, row: TableRow, keys: Sequence[str]) -> list[str]:
        """Every key that differs, with both values where they are few enough to read."""
        if len(keys) > MOST_VALUES:
            return list(keys)
        one, other = with_derived_values(*(self.case.values[name] for name in row.arms))
        return [
            f"{key} ({setting_text(effective(key, one))} against"
            f" {setting_text(effective(key, other))})"
            for key in keys
        ]


def answer_paragraph(rows: Sequence[TableRow], base: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the answer: what the table holds for each pair of arms, and its first sentences."""
    by_pair: dict[tuple[str, str], list[TableRow]] = {}
    for row in rows:
        if not row.aside:
            by_pair.setdefault(row.arms, []).append(row)
    own = [pair for pair in by_pair if not set(pair) & set(base)]
    sentences: list[str] = []
    given = set()  # reasons that were given
    for pair in own or by_pair:
        first, *rest = mine = by_pair[pair]
        sentences.append(summary_sentence(mine))
        shown = [one for one in rest if one.within or one.verdict in ("better", "worse")]
        for row in (first, *shown[:3]):
            no_numbers = row.sentence.startswith("No claim about")
            if not row.because or row.because not in given:
                sentences.append(row.sentence)
            elif row.verdict != "cannot be tested" and not no_numbers:
                sentences.append(f"{_without_reasons(row)}, for the reasons above.")
            given.add(row.because)
    others = [pair for pair in by_pair if own and pair not in own]
    return (*sentences, *(summary_sentence(by_pair[pair]) for pair in others))


def _without_reasons(row: TableRow) -> str:
    return row.sentence.removesuffix(f": {row.because}.")


def remaining_sentences(
    rows: Sequence[TableRow], said: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """Return the sentences of a table that its answer does not hold, as (reasons, sentences): those
    with the same reasons stand together, a single one holds its own.
    """
    found: dict[str, list[TableRow]] = {}
    for row in rows:
        if row.sentence not in said and row.verdict != "not tested":
            found.setdefault(row.because, []).append(row)
    return [
        (
            (because, [_without_reasons(row) + "." for row in mine])
            if because and len(mine) > 1
            else ("", [row.sentence for row in mine])
        )
        for because, mine in found.items()
    ]


def nothing_compared(
    measurements: Measurements, findings: Sequence[Finding], rows: Sequence[TableRow] = ()
) -> tuple[str, ...]:
    """Return the answer where no two arms have a metric in common: for each pair the errors that
    stand against its losses and times.

    Args:
        rows: comparisons of what the trainings took.
    """
    names = [name for name, arm in measurements.arms.items() if arm.runs]
    if not names:
        return ("Nothing is measured yet.",)
    what = "Losses" if any(row.tested for row in rows) else "Losses and times"
    nothing = "No answers" if rows else "Nothing"
    sentences = [f"{nothing} can be compared: no two arms have a metric in common."]
    for position, second in enumerate(names):
        for first in names[:position]:
            both = [one for one in findings if {first, second} <= set(one.arms)]
            errors = [one for one in both if one.severity == "error"]
            if errors:
                told = f"{what} of {first} and {second} are no comparison either"
                sentences.append(f"{told}: {_reasons(errors)}.")
    return tuple(sentences)


def summary_sentence(rows: Sequence[TableRow]) -> str:
    """Return the sentence that counts the verdicts of one pair of arms."""
    first, second = rows[0].arms
    said = dict.fromkeys(
        (
            "better",
            "worse",
            "faster",
            "slower",
            "equivalent",
            "not worse",
            "not better",
            "no difference shown",
            "no claim (an error was found)",
            "no claim (one recipe, trained twice)",
            "cannot be tested",
        ),
        0,
    )
    for row in rows:
        words = row.verdict_words
        if words == "no difference shown":
            words = row.within or words
        if not row.claimed:
            twice = row.because == ONE_RECIPE
            words = f"no claim ({'one recipe, trained twice' if twice else 'an error was found'})"
        said[words] += 1
    (most, n), *more = [(words, n) for words, n in said.items() if n]
    if len(rows) == 1:
        return f"{first} against {second}, 1 comparison: {most}."
    if not more:
        every = "all" if most in ("better", "worse") else "any of the"
        return f"{first} against {second}: {most} on {every} {n} comparisons."
    parts = [f"{most} on {n} of {len(rows)} comparisons", *(f"{words} on {n}" for words, n in more)]
    return f"{first} against {second}: {', '.join(parts)}."


def _reasons(findings: Sequence[Finding]) -> str:
    """The titles of findings as a clause; beyond three, their number."""
    titles = list(dict.fromkeys(_lower(finding.title).rstrip(".") for finding in findings))
    more = f"; and {len(titles) - 3} more" if len(titles) > 3 else ""
    return "; ".join(titles[:3]) + more


def _lower(title: str) -> str:
    """A title inside a sentence: its first letter small, unless its first word is a name."""
    word = title.split(" ", 1)[0]
    return title[:1].lower() + title[1:] if word[:1].isupper() and word[1:].islower() else title
