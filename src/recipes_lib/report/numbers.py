"""Every number of a report as CSV and JSON: what it is, n, interval, and the file it comes from.

A CSV cell that a spreadsheet would read as a formula gets an apostrophe before it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.answers import ANSWER_FAULTS
from recipes_lib.compare.relabelling import Relabelling
from recipes_lib.compare.row import json_value
from recipes_lib.statistics.intervals import wilson

if TYPE_CHECKING:
    from recipes_lib.report.content import Content
    from recipes_lib.report.surfaces import Surface

_FORMAT_VERSION = 1
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number; each field is a column, None where it does not apply."""

    kind: str
    metric: str
    arm: str | None = None
    other_arm: str | None = None
    against: str | None = None
    group: str | None = None
    unit: str | None = None
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None
    questions: int | None = None
    seeds: int | None = None
    unresolved: int | None = None
    lowest: float | None = None
    highest: float | None = None
    p: float | None = None
    p_holm: float | None = None
    level_share: float | None = None
    mde: float | None = None
    primary: bool | None = None
    margin: float | None = None
    p_not_worse: float | None = None
    p_not_better: float | None = None
    within: str | None = None
    verdict: str | None = None
    claim_stopped: bool | None = None
    test: str | None = None
    interval: str | None = None
    file: str


def number_rows(content: Content) -> Iterator[Number]:
    """Yield every number."""
    yield from _of_comparison(content)
    if looks := content.comparison.looks:
        yield Number(
            kind="looks",
            metric="looks at results",
            unit="number",
            value=looks.number,
            n=None,
            file="",
        )
    if content.comparison.relabelling:
        yield from _of_relabelling(content.comparison.relabelling)
    for breakdown in content.breakdowns:
        yield from breakdown.cells
    for surface in content.surfaces:
        yield from _of_surface(surface)
    yield from _of_runs(content)
    for audit in content.audits:
        yield from audit.measured
    yield from content.floor
    for one in content.published.numbers if content.published else ():
        ours = (
            one.beside is not None
        )  # then in the unit of our metric, as everywhere under its name
        low, high = (one.our_interval if ours else one.interval) or (None, None)
        yield Number(
            kind="published",
            metric=one.beside or f"{one.table}/{one.metric}",
            arm=one.arm,
            group=one.label,
            value=one.ours if ours else one.value,
            low=low,
            high=high,
            n=one.n,
            file=content.published.path.name if content.published else "",
        )


def _of_comparison(content: Content) -> Iterator[Number]:
    for score in content.comparison.scores:
        yield _like(
            score,
            kind="score",
            against=score.opponent,
            interval=score.method,
            file=" ".join(score.files),
        )
    for one in content.comparison.answers:
        shares = [(fault, "share", one.share(fault)) for fault in ANSWER_FAULTS]
        for metric, unit, value in (*shares, ("characters", "number", one.characters)):
            if value is not None:
                yield _like(
                    one, kind="answers", metric=metric, group=one.eval, unit=unit, value=value
                )
    for other in content.comparison.answer_differences:
        yield Number(
            kind="answers",
            metric=other.fault,
            arm=other.first,
            other_arm=other.second,
            group=other.eval,
            unit="share",
            value=other.difference,
            low=other.low,
            high=other.high,
            n=other.questions,
            file=" ".join(
                one.file
                for one in content.comparison.answers
                if one.eval == other.eval and one.arm in (other.first, other.second)
            ),
        )
    for row in content.comparison.rows:
        tested = row.tested
        limits = ("low", "high", "lowest", "highest")
        yield _like(
            tested,
            kind="comparison",
            metric=row.metric,
            arm=row.first,
            other_arm=row.second,
            against="head to head" if row.head_to_head else row.opponent,
            unit=row.unit,
            value=row.shown(row.difference),
            **{name: row.shown(getattr(tested, name, None)) for name in limits},
            n=tested.n if tested else None,
            p_holm=row.p_holm,
            level_share=row.level_share if row.p_holm is not None else None,
            mde=row.mde,
            primary=row.primary,
            margin=row.margin,
            p_not_worse=row.p_not_worse,
            p_not_better=row.p_not_better,
            within=row.within or None,
            verdict=row.verdict,
            claim_stopped=bool(row.stopped),
            interval=tested.interval_method if tested else None,
            file=" ".join(row.files),
        )


def _of_relabelling(own: Relabelling) -> Iterator[Number]:
    """How often copies of the study ended in a claim, and in how many a planted difference was
    found.
    """
    planted = own.planted
    shares = [("copies without a difference that hold a claim", own.claims, own.copies)]
    if planted:
        what = "copies in which a planted difference was found"
        shares.append((what, planted.found, planted.copies))
    for what, hits, copies in shares:
        interval = wilson(hits, copies)
        yield Number(
            kind="relabelled",
            metric=what,
            unit="share",
            value=interval.estimate,
            low=interval.low,
            high=interval.high,
            n=copies,
            interval=interval.method,
            file="",
        )


def _of_surface(surface: Surface) -> Iterator[Number]:
    """One metric of every arm of a grid, with the arm's values of the grid's keys."""
    for cell in surface.cells:
        second = "" if surface.second is None else f", {surface.second}={cell.second:g}"
        yield _like(
            cell,
            kind="grid",
            metric=surface.metric,
            group=f"{surface.key}={cell.place:g}{second}",
            unit=surface.unit,
            verdict="best" if cell.best else None,
        )


def _like(one: object, **own: Any) -> Number:
    """A number with the columns that an object has by the same name, and its own."""
    names = [field.name for field in fields(Number) if hasattr(one, field.name)]
    return Number(**{name: getattr(one, name) for name in names} | own)


def _of_runs(content: Content) -> Iterator[Number]:
    """Tunings, trainings and costs; one run each, so n is 1 and there is no interval, and the sum
    of each arm.
    """
    for tried in content.tunings:
        yield _like(
            tried,
            kind="tuning",
            metric="validation_loss",
            group=f"{tried.key}={tried.value}",
            value=tried.loss,
            n=1,
            verdict="chosen" if tried.chosen else "diverged" if tried.loss is None else None,
        )
    training = (
        "steps",
        "train_loss",
        "validation_loss",
        "best_validation_loss",
        "perplexity",
        "tokens_per_second",
        "peak_memory_gib",
        "planned_peak_memory_gib",
    )
    cost = ("seconds", "device_hours", "tokens", "tokens_per_second")
    for kind, names, rows in (
        ("training", training, [(one, one.run) for one in content.trainings]),
        ("cost", cost, [(one, f"{one.run}, {one.what}") for one in content.costs]),
    ):
        for one, group in rows:
            for name in names:
                if (value := getattr(one, name)) is not None:
                    yield _like(one, kind=kind, metric=name, group=group, value=value, n=1)
    for arm in content.arm_costs:
        group = "all runs, at least" if arm.partial else "all runs"
        value, runs = arm.device_hours, arm.runs
        yield _like(arm, kind="cost", metric="device_hours", group=group, value=value, n=runs)


def numbers_csv(content: Content) -> str:
    """Return the CSV."""
    stream = io.StringIO()
    columns = [field.name for field in fields(Number)]
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for number in number_rows(content):
        writer.writerow({key: cell(value) for key, value in asdict(number).items()})
    return stream.getvalue()


def cell(value: object) -> object:
    """Return a cell: numbers as they are, text that a spreadsheet would run made text.

    Example:
        >>> cell("=1+1"), cell(-0.5), cell("plain"), cell(None)
        ("'=1+1", -0.5, 'plain', '')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str):
        return value
    text = "".join(char for char in value if char.isprintable() or char in "\n\t")
    return f"'{text}" if text.lstrip().startswith(_FORMULA) or text.startswith(_FORMULA) else text


def numbers_json(content: Content) -> str:
    """Return the JSON: question, answer, findings, and all numbers."""
    numbers = [
        {key: json_value(item) for key, item in asdict(number).items() if item is not None}
        for number in number_rows(content)
    ]
    head = {"format_version": _FORMAT_VERSION, "name": content.name}
    value = {**head, **content.comparison.to_dict(), "numbers": numbers}
    return json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
