"""What may be said: a verdict for every row of the table, and its sentence.

A claim is data; its text is made last and nothing reads it. What is never said: a verdict before
everything declared is there or after the design was changed, one that a finding stops, "better" of
an arm that was trained once, a cause where anything but the declared keys differs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from recipes_lib.analysis import row_text
from recipes_lib.analysis.aims import Aims, Design, is_named
from recipes_lib.analysis.checks import find
from recipes_lib.analysis.differences import Difference, arm_differences
from recipes_lib.analysis.findings import (
    DEGENERATE_ANSWERS,
    EVALUATED_DIFFERENTLY,
    REPEATED_QUESTIONS,
    UNAUDITED,
    Finding,
)
from recipes_lib.analysis.looks import FUTILE_BELOW
from recipes_lib.analysis.ranking import Ranking, rank
from recipes_lib.analysis.runs import Arms
from recipes_lib.analysis.table import TestedTable, build_table
from recipes_lib.analysis.table_row import TableRow
from recipes_lib.analysis.text import difference_text, p_text, question_text, sentence_list
from recipes_lib.core.terminal import count
from recipes_lib.stats import ALPHA

NO_SUCH_METRIC = "no-such-metric"  # the code of a finding that stops the answer
Verdict = Literal["better", "worse", "higher", "lower", "not shown", "no verdict", "not tested"]
Within = Literal["", "equivalent", "not worse", "not better"]


@dataclass(frozen=True)
class Claim:
    """What a row shows, of the first arm against the second.

    "higher" and "lower" are about these two models and no more. `stopped_by` are the findings that
    leave no verdict, `descriptive` is why nothing of this table has one. `cause` are the declared
    keys that alone differ.
    """

    row: TableRow
    verdict: Verdict
    within: Within = ""
    stopped_by: tuple[Finding, ...] = ()
    descriptive: str = ""
    one_recipe: bool = False
    cause: tuple[Difference, ...] = ()
    no_cause: str = ""
    remarks: tuple[str, ...] = ()  # sentences about what stops no claim

    @property
    def says(self) -> str:
        """The verdict in a word or two, for tables."""
        if not self.within:
            return self.verdict
        if self.verdict == "not shown":
            return self.within
        return f"{self.verdict}, {self.within}"

    def worse_than(self, arm: str) -> bool:
        """Return whether the other arm tests as worse than `arm`, whatever stops the sentence."""
        if self.row.second == arm:
            return _direction(self.row) < 0
        return _direction(self.row) > 0

    def not_worse_than(self, arm: str) -> bool:
        """Return whether the other arm is shown not to be worse than `arm` within the margin."""
        if self.within == "equivalent":
            return True
        if self.row.second == arm:
            return self.verdict in ("better", "higher") or self.within == "not worse"
        return self.verdict in ("worse", "lower") or self.within == "not better"

    @property
    def winner(self) -> str | None:
        """The arm that is shown to be better, "" if none is; None without a verdict."""
        if self.verdict in ("better", "higher"):
            return self.row.first
        if self.verdict in ("worse", "lower"):
            return self.row.second
        return "" if self.verdict == "not shown" else None

    @property
    def is_futile(self) -> bool:
        """Whether a study that stops here for it would hardly have shown anything."""
        chance = self.row.chance
        return self.verdict == "not shown" and chance is not None and chance < FUTILE_BELOW

    def is_decided(self, baseline: str | None) -> bool:
        """Return whether more seeds need not be trained for this row.

        Between an arm and the baseline "not worse" is an answer, between two others it is half of
        one. What an error finding stops is not mended by seeds.
        """
        if self.winner or self.stopped_by or self.is_futile or self.within == "equivalent":
            return True
        return baseline in self.row.arms and self.not_worse_than(str(baseline))

    @property
    def sentence(self) -> str:
        """The claim as a sentence."""
        text = _sentence(self)
        if self.verdict in ("no verdict", "not tested"):
            return text
        text += row_text.lengths_text(self.row)
        for remark in self.remarks:
            text += f" {remark}"
        return text


@dataclass(frozen=True)
class Conclusion:
    """Everything that a report says: table, findings, and a claim for every row."""

    question: str
    table: TestedTable
    findings: tuple[Finding, ...]
    claims: tuple[Claim, ...]
    aims: Aims
    descriptive: str = ""
    waiting: str = ""  # for what a study is not complete without: its arms are not compared yet

    @property
    def pairs(self) -> dict[tuple[str, str], list[Claim]]:
        """The claims by pair of arms."""
        pairs: dict[tuple[str, str], list[Claim]] = {}
        for claim in self.claims:
            pairs.setdefault(claim.row.arms, []).append(claim)
        return pairs

    @property
    def primary_claims(self) -> dict[tuple[str, str], Claim]:
        """The claim that answers for each pair of arms."""
        claims_of_pair = {}
        for pair, claims in self.pairs.items():
            tested = [claim for claim in claims if not claim.row.aside]
            if tested:
                claims_of_pair[pair] = tested[0]
        return claims_of_pair

    @property
    def ranking(self) -> Ranking | None:
        """All arms in one answer, where they are many and compared on one metric."""
        claims = list(self.primary_claims.values())
        if self.waiting or self.descriptive or len({claim.row.metric for claim in claims}) != 1:
            return None
        return rank([claim.row for claim in claims], [claim.winner for claim in claims])

    @property
    def undecided(self) -> list[tuple[str, str]]:
        """The pairs of arms for which more seeds are worth their trainings."""
        claims = self.primary_claims.items()
        return [pair for pair, claim in claims if not claim.is_decided(self.aims.baseline)]

    @property
    def look_text(self) -> str:
        """At which look the study ended, and its level; nothing of a study with one test."""
        look = self.aims.look
        if look is None or self.waiting or self.descriptive:
            return ""
        level = f"tested at {100 * self.table.alpha:g}%, its share of {100 * ALPHA:g}%"
        if look.is_last:
            return f"Ended at {look.place}; {level}."
        return f"Stopped at {look.place}; {level}. {count(look.saved, 'training')} saved."

    @property
    def answer(self) -> list[str]:
        """One sentence for each pair of arms, or one for many arms, about the primary metric and no
        other; then the look that they come from.
        """
        if self.waiting:
            return [self.waiting]
        absent = [finding for finding in self.findings if finding.code == NO_SUCH_METRIC]
        of_all_pairs = [finding for finding in absent if not finding.arms]
        if of_all_pairs:
            return [f"No answer: {_inside(finding.title)}." for finding in of_all_pairs]
        of_pair = {finding.arms: finding for finding in absent}
        claims = self.primary_claims
        sentences = []
        ranking = self.ranking
        if ranking and not absent:
            rows = [claim.row for claim in claims.values()]
            sentence = ranking.text(rows[0].label)
            if not all(row.has_several_trainings for row in rows):
                sentence += " Not every arm has two trainings: another seed may differ."
            sentences.append(sentence)
            claims = {}
        for pair in self.pairs:
            if pair in of_pair:
                sentences.append(f"No answer: {of_pair[pair].title}.")
            elif pair in claims:
                sentences.append(claims[pair].sentence)
        if self.look_text:
            sentences.append(self.look_text)
        return sentences

    @property
    def cannot_say(self) -> list[str]:
        """What prevents a verdict or an answer, each with its fix."""
        stops = [finding for finding in self.findings if finding.code == NO_SUCH_METRIC]
        for claim in self.claims:
            stops += claim.stopped_by
        lines = [self.descriptive] if self.descriptive else []
        for finding in stops:
            line = f"{finding.title}."
            if finding.remedy:
                line += f" Fix: {finding.remedy}."
            if line not in lines:
                lines.append(line)
        return lines

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain values, for JSON."""
        rows = []
        for claim in self.claims:
            row = claim.row.to_dict()
            row["verdict"] = claim.verdict
            row["within"] = claim.within
            row["stopped_by"] = [finding.code for finding in claim.stopped_by]
            row["cause"] = [difference.what for difference in claim.cause]
            row["sentence"] = claim.sentence
            rows.append(row)
        return {
            "question": self.question,
            "answer": self.answer,
            "cannot_say": self.cannot_say,
            "alpha": self.table.alpha,
            "ranking": asdict(self.ranking) if self.ranking else None,
            "look": asdict(self.aims.look) if self.aims.look else None,
            "tests": self.table.tests,
            "rows": rows,
            "scores": [asdict(score) for score in self.table.scores],
            "findings": [asdict(finding) for finding in self.findings],
        }


def conclude(arms: Arms, aims: Aims | None = None, design: Design | None = None) -> Conclusion:
    """Return the table with its findings, and what may be said; no cause without a design."""
    aims = aims or Aims()
    findings = find(arms, design)
    errors = [finding for finding in findings if finding.severity == "error"]
    table = build_table(arms, aims, lambda row: any(error.touches(row) for error in errors))
    descriptive = _why_descriptive(design)
    waiting = ""
    if design is not None and design.missing and table.rows:
        # Who sees differences can still choose arms, seeds and evals by them. A win rate against
        # another arm is one.
        scores = [score for score in table.scores if score.opponent not in arms.by_name]
        without_intervals = [replace(score, interval=None) for score in scores]
        table = TestedTable(rows=(), scores=tuple(without_intervals))
        left = count(len(design.missing), "training or result")
        waiting = f"Interim: {left} still missing. The arms are compared when all are there."
        if design.went_on:
            waiting += f" {design.went_on}"
    if table.rows and not descriptive:
        findings = _absent_metrics(table, aims) + findings
    differences: dict[tuple[str, str], list[Difference]] = {}
    for first, second in dict.fromkeys(row.arms for row in table.rows):
        differences[first, second] = arm_differences(arms[first], arms[second], design)
    claims = []
    for row in table.rows:
        touching = [finding for finding in findings if finding.touches(row)]
        claim = _claim(row, touching, differences[row.arms], design, descriptive)
        remarks = _remarks(claim, touching)
        if claim.within and design is None:  # who knows the results can choose the margin by them
            remarks = (*remarks, "The margin was set with this command.")
        claims.append(replace(claim, remarks=remarks))
    names = sentence_list([arm.name for arm in arms])
    return Conclusion(
        question=question_text(design.question) if design else f"How do {names} compare?",
        table=table,
        findings=tuple(findings),
        claims=tuple(claims),
        aims=aims,
        descriptive=descriptive,
        waiting=waiting,
    )


def _absent_metrics(table: TestedTable, aims: Aims) -> list[Finding]:
    """An error for a primary metric or a margin that no row is about.

    It stops the answer, which would be about another metric, and no row: each is about its own.
    """
    metrics = list(dict.fromkeys(row.metric for row in table.rows))
    findings = []
    for word in aims.named:
        if not any(is_named(word, metric) for metric in metrics):
            role = "the primary metric" if word == aims.primary else "which has a margin"
            title = f"No row of the table is about {word}, {role}"
            remedy = f"name a metric that the table has: {sentence_list(metrics)}"
            findings.append(_no_such_metric(word, title, remedy))
    if findings or not aims.primary:
        return findings
    with_primary = {row.arms for row in table.rows if is_named(aims.primary, row.metric)}
    for pair in dict.fromkeys(row.arms for row in table.rows):
        if pair not in with_primary:
            title = f"{pair[0]} and {pair[1]} share no {aims.primary}, the primary metric"
            remedy = f"evaluate both on {aims.primary}"
            findings.append(_no_such_metric(aims.primary, title, remedy, arms=pair))
    return findings


def _no_such_metric(word: str, title: str, remedy: str, arms: tuple[str, ...] = ()) -> Finding:
    return Finding(NO_SUCH_METRIC, "error", title, remedy=remedy, arms=arms, metrics=(word,))


def _why_descriptive(design: Design | None) -> str:
    """Why no row of a study has a verdict, or nothing."""
    if design is None:
        return ""
    if design.changed:
        changes = sentence_list(design.changed, 3)
        reason = "this design is not shown to have stood before results were seen"
        remedy = "a new study name, with new seeds or questions, can have verdicts again"
        return f"Exploratory: {reason} ({changes}); {remedy}."
    if not design.missing:
        return ""
    line = f"Interim: {sentence_list(design.missing, 3)} still missing."
    if design.command:
        line += f" Fix: {design.command}."
    return line


def _claim(
    row: TableRow,
    touching: Sequence[Finding],
    differences: Sequence[Difference],
    design: Design | None,
    descriptive: str,
) -> Claim:
    """What a row shows, with the findings that touch it and the differences between its arms."""
    if row.aside:
        return Claim(row=row, verdict="not tested")
    stopped_by = tuple(finding for finding in touching if finding.severity == "error")
    if not row.is_tested or stopped_by or descriptive:
        return Claim(row=row, verdict="no verdict", stopped_by=stopped_by, descriptive=descriptive)
    direction = _direction(row)
    within = _within(row)
    if not direction:
        return Claim(row=row, verdict="not shown", within=within)
    # Only of two trained arms of a study it is known what was meant to differ.
    has_causes = min(row.trainings) > 0 and design is not None
    one_recipe = has_causes and all(difference.level == "note" for difference in differences)
    verdict: Verdict
    if one_recipe or not row.has_several_trainings:
        verdict = "higher" if direction > 0 else "lower"
        return Claim(row=row, verdict=verdict, within=within, one_recipe=one_recipe)
    verdict = "better" if direction > 0 else "worse"
    claim = Claim(row=row, verdict=verdict, within=within)
    if not has_causes:
        return claim
    no_cause = _why_no_cause(touching, differences)
    if no_cause:
        return replace(claim, no_cause=no_cause)
    declared = [difference for difference in differences if difference.level in ("cause", "tuned")]
    return replace(claim, cause=tuple(declared))


def _why_no_cause(touching: Sequence[Finding], differences: Sequence[Difference]) -> str:
    """Why a difference between two arms cannot be laid to the declared keys, or nothing."""
    different: list[str] = []
    unrecorded: list[str] = []
    for difference in differences:
        if difference.level == "confound":
            names = unrecorded if difference.is_unknown else different
            names.append(difference.what)
    reasons = []
    if different:
        reasons.append(f"they also differ in {sentence_list(different, 4)}")
    if unrecorded:
        reasons.append(f"neither has a record of its {sentence_list(unrecorded)}")
    for finding in touching:
        # `undeclared-difference` says in other words what `differences` has
        if finding.severity == "confound" and finding.code != "undeclared-difference":
            reasons.append(_inside(finding.title))
    return "; ".join(reasons)


def _remarks(claim: Claim, touching: Sequence[Finding]) -> tuple[str, ...]:
    """What a reader of the sentence alone must know; "no cause is named" has its reasons."""
    codes = {DEGENERATE_ANSWERS, REPEATED_QUESTIONS}
    if not claim.no_cause:
        codes.add(EVALUATED_DIFFERENTLY)
    remarks = [f"{finding.title}." for finding in touching if finding.code in codes]
    if any(finding.code == UNAUDITED for finding in touching):
        remarks.append("Its judge was not audited.")
    return tuple(remarks)


def _direction(row: TableRow) -> int:
    """1 where the first arm tests as better, -1 where it tests as worse, 0 where neither is."""
    if not row.is_tested or row.p is None or row.p > ALPHA:
        return 0
    difference = row.difference
    if not difference or row.interval is None:
        return 0
    return 1 if (difference > 0) == bool(row.higher_is_better) else -1


def _within(row: TableRow) -> Within:
    """What is shown about the margin."""
    if row.p_margin is None:
        return ""
    p_not_worse, p_not_better = row.p_margin
    if max(row.p_margin) <= ALPHA:
        return "equivalent"
    if p_not_worse <= ALPHA:
        return "not worse"
    if p_not_better <= ALPHA:
        return "not better"
    return ""


def _sentence(claim: Claim) -> str:
    row = claim.row
    first = row.first
    second = row.second
    where = row_text.where_text(row)
    if claim.verdict == "not tested":
        return f"{first} and {second} are not tested in {where}: {row.aside}."
    if claim.descriptive and row.test is not None:
        kind = claim.descriptive.partition(":")[0]
        return f"{kind}: {first} and {second} in {where}: {row_text.values_text(row)}, no verdict."
    if claim.verdict == "no verdict":
        why = row.why_not
        if claim.stopped_by:
            why = _inside(claim.stopped_by[0].title)
        if row.first_value is not None:
            where = f"{where} ({row_text.values_text(row)})"
        return f"No verdict about {first} and {second} in {where}: {why}."
    numbers = f"{row_text.values_text(row)}, {row_text.evidence_text(row)}"
    if claim.verdict == "not shown":
        return _not_shown(claim, numbers)
    inside = ""
    if claim.within == "equivalent":
        inside = f" The difference lies within the margin.{row_text.near_end_text(row)}"
    if claim.verdict in ("higher", "lower"):
        score = "scored better" if claim.verdict == "higher" else "scored worse"
        why = row_text.training_text(row)
        if claim.one_recipe:
            why = " Both were trained with one recipe: the difference is chance."
        subject = f"The {first} run" if row.trainings[0] else first
        rival = f"the {second} run" if row.trainings[1] else second
        return f"{subject} {score} than {rival} in {where}: {numbers}.{inside}{why}"
    return f"{first} is {claim.verdict} than {second} in {where}: {numbers}.{inside}{_cause(claim)}"


def _not_shown(claim: Claim, numbers: str) -> str:
    row = claim.row
    first = row.first
    second = row.second
    where = row_text.where_text(row)
    margin = difference_text(row.margin, row.unit, signed=False)
    if row.head_to_head and row.margin is not None:
        margin = f"{margin} of 50%"
    after = row_text.near_end_text(row) + row_text.training_text(row)
    if claim.within == "equivalent":
        return f"{first} and {second} are equivalent within {margin} in {where}: {numbers}.{after}"
    if claim.within:
        word = "worse" if claim.within == "not worse" else "better"
        bound = f"by more than {margin} in {where}"
        return f"{first} is not {word} than {second} {bound}: {numbers}.{after}"
    if row.test and row.test.p <= row.alpha:
        return (
            f"Not enough for a verdict about {first} and {second} in {where}: {numbers}."
            f" On its own it has {p_text(row.test.p)}; this table has {count(row.tests, 'test')}."
        )
    if claim.is_futile:
        seeds = count(row.seeds_left, "remaining seed")
        power = f" With the {seeds} the chance of showing one was under {FUTILE_BELOW:.0%}."
    else:
        power = row_text.power_text(row)
    return f"No difference shown between {first} and {second} in {where}: {numbers}.{power}"


def _cause(claim: Claim) -> str:
    row = claim.row
    if claim.no_cause:
        return f" No cause is named: {claim.no_cause}."
    declared = [difference.text for difference in claim.cause if difference.level == "cause"]
    tuned = [difference.text for difference in claim.cause if difference.level == "tuned"]
    if not declared:
        return ""
    only = f"Only {sentence_list(declared)} differ"  # all: any of them may be the cause
    owner = "their joint"
    if len(declared) == 1:
        only += "s"
        owner = "its"
    only += " between them"
    if tuned:
        only += f", each at its best {sentence_list(tuned)}"
    seeds = count(min(row.trainings), "training seed")
    return f" {only}, so this is {owner} effect over {seeds}."


def _inside(title: str) -> str:
    """A title inside a sentence: its first word small unless it is a name."""
    starts = ("The ", "All ", "Different ", "Comparisons ", "No row ")
    if not title.startswith(starts):
        return title
    return title[0].lower() + title[1:]
