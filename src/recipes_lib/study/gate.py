"""`recipes study report --gate`: may these arms stand in for their baseline? For CI, from files.

An arm that tests as worse fails also where a finding stops the sentence: a gate that opens because
its judge failed would be none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from recipes_lib.analysis.aims import is_named
from recipes_lib.analysis.claims import Claim
from recipes_lib.core.errors import ExitCode
from recipes_lib.study.conclusion import conclude_study
from recipes_lib.study.config import Study


@dataclass(frozen=True)
class Refusal:
    """Why the gate stays shut: an arm that is worse, or is not shown to be not worse."""

    arm: str
    metric: str
    sentence: str


@dataclass(frozen=True)
class Gate:
    """The answer. `missing` are results that are not there, and arms without a tested comparison;
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
    _, design, conclusion = conclude_study(study)
    return judge_claims(study, conclusion.claims, design.missing)


def judge_claims(study: Study, claims: Sequence[Claim], missing: Sequence[str]) -> Gate:
    """Return the answer that claims give; `missing` are results that are not there."""
    baseline, lacking = study.baseline, list(missing)
    claims = [claim for claim in claims if baseline in claim.row.arms and not claim.row.aside]
    arms = [arm.name for arm in study.arms if arm.name != baseline]
    for arm in arms:
        tested = any(claim.row.is_tested for claim in claims if arm in claim.row.arms)
        if not missing and not tested:
            lacking.append(f"a comparison of {arm} with {baseline} that can be tested")
    worse = tuple(
        Refusal(_other(claim, baseline), claim.row.metric, claim.sentence)
        for claim in claims
        if claim.worse_than(baseline)
    )
    not_shown = tuple(_not_shown(study, claims, arms))
    margins = tuple(study.aims.margins)
    return Gate(study.name, baseline, len(claims), margins, tuple(lacking), worse, not_shown)


def _not_shown(study: Study, claims: Sequence[Claim], arms: Sequence[str]) -> Iterator[Refusal]:
    """Yield the margins within which an arm is not shown to be not worse, also those of metrics
    that it lacks.
    """
    baseline = study.baseline
    for claim in claims:
        shown = claim.not_worse_than(baseline)
        if claim.row.margin is not None and not shown and not claim.worse_than(baseline):
            yield Refusal(_other(claim, baseline), claim.row.metric, claim.sentence)
    for arm in arms:
        for word in study.aims.margins:
            rows = [
                one.row for one in claims if arm in one.row.arms and is_named(word, one.row.metric)
            ]
            if not any(row.margin is not None for row in rows):
                what = f"{arm} and {baseline} have no comparison on {word}, which has a margin."
                yield Refusal(arm, word, what)


def _other(claim: Claim, baseline: str) -> str:
    return claim.row.first if claim.row.second == baseline else claim.row.second
