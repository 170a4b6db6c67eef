"""Reasons not to believe a comparison: every check is a small function of what was measured, and
says what it found as `Finding`s.

docs/studies.md has the table of all codes. Two prefixes mean something to `claims`: a code that
starts with `confound` leaves an association where a difference was shown, one that starts with
`identical` leaves nothing to compare. Needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes_lib.compare.findings import Finding, errors_first
from recipes_lib.compare.validity.artifacts import check_artifacts
from recipes_lib.compare.validity.circumstances import check_circumstances
from recipes_lib.compare.validity.confounds import check_confounds
from recipes_lib.compare.validity.factors import check_factors
from recipes_lib.compare.validity.judging import check_judging
from recipes_lib.compare.validity.losses import check_losses
from recipes_lib.compare.validity.noise import check_noise
from recipes_lib.compare.validity.protocol import check_protocol
from recipes_lib.compare.validity.selection import check_selection
from recipes_lib.compare.validity.sources import check_sources

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements

CHECKS = (
    check_confounds,
    check_circumstances,
    check_factors,
    check_artifacts,
    check_judging,
    check_protocol,
    check_selection,
    check_noise,
    check_losses,
    check_sources,
)


def check_validity(study: Study | None, measurements: Measurements) -> list[Finding]:
    """Return everything that was found, errors first.

    Args:
        study: the study; None for `recipes compare`, which declares no factor.
        measurements: what was measured; arms without a run are published numbers alone.
    """
    return errors_first(finding for check in CHECKS for finding in check(study, measurements))
