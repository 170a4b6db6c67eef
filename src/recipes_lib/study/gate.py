"""`recipes study report --gate`: may these arms stand in for their baseline? For CI, from files.

Every sentence is a row's own, as `compare/claims` wrote it. An arm that tested as worse fails
also where a finding stops the claim: a gate that opens because its judge failed would be none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from recipes_lib.compare.aims import is_named
from recipes_lib.compare.design import Study
from recipes_lib.compare.row import TableRow
from recipes_lib.core.errors import ExitCode
from recipes_lib.study.conclusion import compare_study
from recipes_lib.study.runs import missing_of


@dataclass(frozen=True)
class Refusal:
    """Why the gate stays shut: an arm that is worse, or is not shown to be not worse."""

    arm: str
    metric: str
    sentence: str


@dataclass(frozen=True)
class Gate:
    """The answer. `missing` are steps without a result, and arms without a tested comparison;
    `margins` the metrics that were held to one.
    """

    study: str
    baseline: str
    comparisons: int
    margins: tuple[str, ...]
    missing: tuple[str, ...]
    worse: tuple[Refusal, ...]
    not_shown: tuple[Refusal, ...]

    @property
    def code(self) -> ExitCode:
        """The exit code: 6 where results are missing, 1 where an arm fails, else 0."""
        if self.missing:
            return ExitCode.EVALUATION_INCOMPLETE
        return ExitCode.FAILED if self.worse or self.not_shown else ExitCode.DONE

    def to_dict(self) -> dict[str, object]:
        """Return the answer for --json."""
        return {**asdict(self), "passed": not self.code, "exit_code": int(self.code)}


def gate(study: Study) -> Gate:
    """Return whether an arm is worse than the baseline or, where there is a margin, not shown to be
    not worse within it.

    Raises:
        RecipesError: an evaluation's files are damaged.
    """
    missing = missing_of(study)
    _, comparison = compare_study(study)
    baseline = study.baseline
    rows = [row for row in comparison.rows if baseline in row.arms and not row.aside]
    arms = [arm.name for arm in study.arms if arm.name != baseline]
    for arm in arms:
        mine = [row for row in rows if arm in row.arms]
        if not missing and not any(row.p_holm is not None for row in mine):
            missing.append(f"no comparison of {arm} with {baseline} could be tested")
    return Gate(
        study.name,
        baseline,
        len(rows),
        tuple(study.aims.margins),
        tuple(missing),
        tuple(
            Refusal(_other(row, baseline), row.metric, row.sentence)
            for row in rows
            if row.verdict == ("worse" if row.second == baseline else "better")
        ),
        tuple(_not_shown(study, rows, arms)),
    )


def _not_shown(study: Study, rows: Sequence[TableRow], arms: Sequence[str]) -> Iterator[Refusal]:
    """Yield the margins within which an arm is not shown to be not worse, also those of metrics
    that it lacks.
    """
    baseline = study.baseline
    for row in rows:
        first = row.second == baseline
        shown = row.verdict == ("better" if first else "worse") or (
            row.within in ("equivalent", "not worse" if first else "not better")
        )
        worse = row.verdict == ("worse" if first else "better")
        if row.margin is not None and not worse and (row.stopped or not shown):
            yield Refusal(_other(row, baseline), row.metric, row.sentence)
    for arm in arms:
        for word in study.aims.margins:
            mine = [row for row in rows if arm in row.arms and is_named(word, row.metric)]
            if not any(row.margin is not None for row in mine):
                what = f"{arm} and {baseline} have no comparison on {word}, which has a margin."
                yield Refusal(arm, word, what)


def _other(row: TableRow, baseline: str) -> str:
    return row.first if row.second == baseline else row.second
