"""Reasons not to believe a comparison: every check is a small function of what was measured.

`findings.FINDING_TEXTS` has the texts, docs/studies.md the table of all codes. Needs no torch.
"""

from __future__ import annotations

from recipes_lib.compare.design import Study
from recipes_lib.compare.findings import Finding, errors_first
from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.validity.artifacts import check_artifacts
from recipes_lib.compare.validity.case import Case
from recipes_lib.compare.validity.confounds import (
    check_circumstances,
    check_evaluated_base,
    check_factors,
    check_losses,
    check_published,
    check_recipes,
)
from recipes_lib.compare.validity.judging import check_judging
from recipes_lib.compare.validity.leaks import check_leaks
from recipes_lib.compare.validity.noise import check_noise, check_selection
from recipes_lib.compare.validity.protocol import check_presence, check_protocol

CHECKS = (
    check_recipes,
    check_circumstances,
    check_evaluated_base,
    check_published,
    check_factors,
    check_artifacts,
    check_judging,
    check_protocol,
    check_leaks,
    check_presence,
    check_selection,
    check_noise,
    check_losses,
)


def check_validity(study: Study | None, measurements: Measurements) -> list[Finding]:
    """Return everything that was found, errors first.

    Args:
        study: the study; None for `recipes compare`, which declares no factor.
        measurements: what was measured; arms without a run are published numbers alone.
    """
    case = Case(study, measurements)
    return errors_first(one for check in CHECKS for one in check(case))
