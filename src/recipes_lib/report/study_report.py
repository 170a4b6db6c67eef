"""The report of a study: what its runs measured, checked, compared, and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.compare.published import load_published
from recipes_lib.report.build import write_report
from recipes_lib.report.content import gather

if TYPE_CHECKING:
    from recipes_lib.compare.claims import Comparison
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements


def write_study_report(
    folder: Path,
    comparison: Comparison,
    measurements: Measurements,
    study: Study,
    banners: Sequence[str] = (),
) -> Path:
    """Write the report of a comparison that was made already, and return report.html.

    Args:
        banners: lines for the top of the report, such as which steps are not up to date.
    """
    published = load_published(study.published) if study.published else None
    write_report(folder, gather(study.name, measurements, comparison, study, published, banners))
    return folder / "report.html"
