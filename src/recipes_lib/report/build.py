"""Building a report: read the runs, check them, compare, and write every form of the report into one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.atomic_files import write_bytes, write_text
from recipes_lib.report.content import Content, gather
from recipes_lib.studies.claims import Comparison, compare_arms
from recipes_lib.studies.measurements import Measurements, read_measurements

if TYPE_CHECKING:
    from recipes_lib.studies.study import Study


def build_report(study: Study, runs: Mapping[str, Sequence[Path]], folder: Path) -> Path:
    """Read the runs of a study, compare them and write the report.

    Args:
        runs: folders of runs by arm, one per seed, the base among them; an arm of published numbers alone has none.
        folder: where the report goes (runs/<study>/report).

    Returns:
        report.html.

    Raises:
        DataError: a run's file is damaged, or its numbers do not agree with its items.
    """
    measurements, comparison = compare_study(study, runs)
    content = study_content(study, measurements, comparison)
    return next(path for path in write_report(folder, content) if path.name == "report.html")


def compare_study(study: Study, runs: Mapping[str, Sequence[Path]]) -> tuple[Measurements, Comparison]:
    """Return what was measured and what follows from it (the step `statistics`)."""
    from recipes_lib.studies.validity import check_validity

    measurements = read_measurements(runs)
    return measurements, compare_arms(measurements, check_validity(study, measurements), study)


def study_content(study: Study, measurements: Measurements, comparison: Comparison) -> Content:
    """Return the content of a study's report."""
    from recipes_lib.studies.published import load_published

    return gather(study.name, measurements, comparison, study, load_published(study.published) if study.published else None)


def write_report(folder: Path, content: Content) -> list[Path]:
    """Write report.html, report.md, report.tex (report.pdf where TeX exists), numbers.csv, numbers.json and figures/.

    The same content gives the same bytes. Files of an earlier report that no longer belong to this one are removed.

    Returns:
        The files written.
    """
    from recipes_lib.report.figures import draw_figures
    from recipes_lib.report.html import report_html
    from recipes_lib.report.latex import compile_pdf, report_latex
    from recipes_lib.report.markdown import report_markdown
    from recipes_lib.report.numbers import numbers_csv, numbers_json

    figures = draw_figures(content)
    drawn = {f"figures/{figure.name}.{kind}": data for figure in figures for kind, data in figure.files.items()}
    for path in (folder / "figures").glob("*.*") if (folder / "figures").is_dir() else ():
        if f"figures/{path.name}" not in drawn:
            path.unlink()
    texts = {
        "numbers.json": numbers_json(content),
        "numbers.csv": numbers_csv(content),
        "report.md": report_markdown(content, figures),
        "report.tex": report_latex(content, figures),
        "report.html": report_html(content, figures),
    }
    for name, data in drawn.items():
        write_bytes(folder / name, data)
    for name, text in texts.items():
        write_text(folder / name, text)
    pdf = compile_pdf(folder)
    return [*(folder / name for name in (*drawn, *texts)), *([pdf] if pdf else [])]
