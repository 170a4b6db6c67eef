"""The report of a study: what its runs measured, checked, compared, and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.report.build import write_report
from recipes_lib.report.content import gather

if TYPE_CHECKING:
    from recipes_lib.studies.claims import Comparison
    from recipes_lib.studies.measurements import Measurements
    from recipes_lib.studies.study import Study


def build_report(study: Study, runs: Mapping[str, Sequence[Path]], folder: Path) -> Path:
    """Read a study's runs, check and compare them, and write the report.

    Args:
        runs: folders of runs by arm, one per seed, the base among them; an arm of published numbers alone has none.
        folder: where the report goes (runs/<study>/report).

    Returns:
        report.html.

    Raises:
        DataError: a run's file is damaged, or its numbers do not agree with its items.
    """
    from recipes_lib.studies.claims import compare_arms
    from recipes_lib.studies.measurements import read_measurements
    from recipes_lib.studies.validity import check_validity

    measurements = read_measurements(runs)
    return write_study_report(folder, compare_arms(measurements, check_validity(study, measurements), study), measurements, study)


def write_study_report(folder: Path, comparison: Comparison, measurements: Measurements, study: Study, banners: Sequence[str] = ()) -> Path:
    """Write the report of a comparison that was made already, and return report.html.

    Args:
        banners: lines for the top of the report, such as which steps are not up to date.
    """
    from recipes_lib.studies.published import load_published

    published = load_published(study.published) if study.published else None
    write_report(folder, gather(study.name, measurements, comparison, study, published, banners))
    return folder / "report.html"
