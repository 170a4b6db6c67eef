"""Where an arm's numbers come from: another program's files, or a publication alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from recipes_lib.compare.findings import Finding
from recipes_lib.compare.published import load_published
from recipes_lib.core.project import shown_path
from recipes_lib.foreign.run import imported_files

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements


def check_sources(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield imported arms with what their files do not hold, arms of published numbers alone, and
    arms without anything.
    """
    for name, arm in measurements.arms.items():
        for run in (run for run in arm.runs if run.imported):
            files = [str(source["file"]) for source in imported_files(run.state)]
            lacks = [str(lack) for lack in run.state.get("lacks") or ()]
            title = (
                f"{name} is imported: how its answers and verdicts came to be is what its files say"
            )
            evidence = (
                f"run {run.name}: {', '.join(files)}",
                *(f"not carried over: {lack}" for lack in lacks),
            )
            yield Finding(
                "imported",
                "warning",
                title,
                evidence,
                "train and evaluate it here where the claim matters",
                (name,),
            )
    for declared in study.arms if study else ():
        runs = measurements.arms[declared.name].runs if declared.name in measurements.arms else ()
        if declared.published_only:
            title = f"{declared.name} stands for published numbers alone, and cannot be tested"
            remedy = (
                "import its answers and judgments (recipes import FILE... --as RUN), or train it:"
                " remove published_only"
            )
            yield Finding(
                "published-only",
                "error",
                title,
                _published(study, declared.name),
                remedy,
                (declared.name,),
            )
        elif study is not None and declared.imported and not runs:
            title = f"{declared.name} has no files: run '{declared.imported}' was not imported"
            remedy = f"recipes import FILE... --as {declared.imported}"
            evidence = (
                f"{shown_path(study.path)}: arms.{declared.name}.imported: {declared.imported}",
            )
            yield Finding("not-imported", "error", title, evidence, remedy, (declared.name,))
        elif study is not None and declared.trained and len(runs) < len(declared.seeds):
            title = f"{declared.name} has {len(runs)} of {len(declared.seeds)} trainings"
            seeds = (
                f"seeds {', '.join(map(str, declared.seeds))}; there:"
                f" {', '.join(run.name for run in runs) or 'none'}"
            )
            remedy = f"recipes study run {shown_path(study.path)}"
            yield Finding("missing-runs", "warning", title, (seeds,), remedy, (declared.name,))


def _published(study: Study | None, arm: str) -> tuple[str, ...]:
    """The numbers that a publication has of an arm, each with the notes that make it hard to
    compare.
    """
    if study is None or study.published is None:
        return ()

    published = load_published(study.published)
    lines = []
    for number in (number for number in published.of(arm) if number.beside or number.notes):
        n = f" (n {number.n})" if number.n else ""
        notes = f": {'; '.join(number.notes)}" if number.notes else ""
        lines.append(f"{published.titles[number.table]}, {number.label}: {number.shown}{n}{notes}")
    return tuple(lines) or (f"{published.path.name} has no number of {arm}",)
