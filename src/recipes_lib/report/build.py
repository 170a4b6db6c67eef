"""Writing a report: every form of it into one folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.atomic_files import write_bytes, write_text
from recipes_lib.report.figures import draw_comparison
from recipes_lib.report.html import report_html
from recipes_lib.report.latex import compile_pdf, report_latex
from recipes_lib.report.markdown import report_markdown
from recipes_lib.report.numbers import numbers_csv, numbers_json

if TYPE_CHECKING:
    from recipes_lib.report.content import Content


def write_report(folder: Path, content: Content) -> list[Path]:
    """Write report.html, report.md, report.tex (report.pdf where TeX exists), numbers.csv,
    numbers.json and figures/.

    The same content gives the same bytes. Files of an earlier report that no longer belong to this
    one are removed.

    Returns:
        The files written.
    """
    figures = draw_comparison(content)
    drawn = {
        f"figures/{figure.name}.{kind}": data
        for figure in figures
        for kind, data in figure.files.items()
    }
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
