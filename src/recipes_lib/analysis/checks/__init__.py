"""Reasons not to believe a comparison, each a `Finding`; `find` runs all checks.

A check is a function that yields findings. What it is about decides its file.
"""

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.checks import (
    answers,
    asking,
    copies,
    judges,
    questions,
    studies,
    trainings,
)
from recipes_lib.analysis.findings import SEVERITIES, Finding
from recipes_lib.analysis.runs import Arms

# Each is told the arms and what a study declares: None for `recipes compare`.
_CHECKS = (
    copies.check_copies,
    copies.check_former_opponents,
    judges.check_judges,
    judges.check_kinship,
    judges.check_audits,
    answers.check_answers,
    answers.check_cut_answers,
    asking.check_asking,
    questions.check_subsets,
    questions.check_repeats,
    questions.check_records,
    trainings.check_differences,
    trainings.check_base,
    trainings.check_leaks,
    trainings.check_selection,
    trainings.check_equal_choices,
    trainings.check_presence,
    trainings.check_partners,
    studies.check_studies,
    studies.check_choice,
)


def find(arms: Arms, design: Design | None = None) -> list[Finding]:
    """Return what every check found, the heaviest first, each finding once."""
    findings: dict[Finding, None] = {}
    for check in _CHECKS:
        findings |= dict.fromkeys(check(arms, design))
    return sorted(
        findings,
        key=lambda found: (SEVERITIES.index(found.severity), found.code, found.arms, found.title),
    )
