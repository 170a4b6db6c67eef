"""What a report holds, gathered once for all its forms. Every number has its n and the file it
comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from recipes_lib.compare.claims import Comparison, remaining_sentences
from recipes_lib.compare.design import Study
from recipes_lib.compare.measurements import Measurements
from recipes_lib.compare.published import Published, load_published
from recipes_lib.compare.row import TableRow, corrected_values, measures_of, values_of
from recipes_lib.compare.table import Score
from recipes_lib.compare.wording import count
from recipes_lib.eval_log import Check, EvalLog, JudgeFacts, Scorecard, no_reference
from recipes_lib.judging.audit import PROBES
from recipes_lib.report.breakdowns import Breakdown, breakdowns
from recipes_lib.report.numbers import Number
from recipes_lib.report.provenance import commands, provenance
from recipes_lib.report.runs import (
    ArmCost,
    RunCost,
    Training,
    Tuned,
    arm_costs,
    costs,
    trainings,
    tunings,
)
from recipes_lib.report.samples import SampleSet, collect_samples
from recipes_lib.report.surfaces import Surface, surfaces

# Points (step, value) by curve, arm and seed.
Curves = dict[str, dict[str, dict[int | None, list[tuple[float, float]]]]]
CURVES = {
    "loss": ("loss", "training loss per token"),
    "eval_loss": ("validation_loss", "validation loss per token"),
    "perplexity": ("validation_perplexity", "validation perplexity"),
    "learning_rate": ("learning_rate", "learning rate"),
    "tokens_per_second": ("throughput", "tokens per second"),
    "peak_memory_gib": ("memory", "peak memory, GiB"),
}


@dataclass(frozen=True)
class Audit:
    """A judge's audit over the judgments of one evaluation: the checks, and what was measured."""

    eval: str
    judge: str
    model: str
    checks: Sequence[Check]
    measured: tuple[Number, ...]


@dataclass(frozen=True)
class Content:
    """Everything that a report shows. `floor` is how much changes where nothing was changed."""

    name: str
    comparison: Comparison
    trainings: tuple[Training, ...]
    costs: tuple[RunCost, ...]
    breakdowns: tuple[Breakdown, ...]
    audits: tuple[Audit, ...]
    floor: tuple[Number, ...]
    samples: SampleSet
    commands: tuple[tuple[str, tuple[str, ...]], ...]
    provenance: tuple[tuple[str, str], ...]
    banners: tuple[str, ...]
    published: Published | None
    curves: Curves = field(repr=False, default_factory=dict)
    tunings: tuple[Tuned, ...] = ()
    surfaces: tuple[Surface, ...] = ()

    @property
    def tuned(self) -> dict[str, list[Tuned]]:
        """The values that were tried for each tuned arm."""
        arms = dict.fromkeys(one.arm for one in self.tunings)
        return {arm: [one for one in self.tunings if one.arm == arm] for arm in arms}

    @property
    def pairs(self) -> list[tuple[tuple[str, str], list[TableRow]]]:
        """The table's rows by pair of arms, in the table's order."""
        names = dict.fromkeys(row.arms for row in self.comparison.rows)
        return [(pair, [row for row in self.comparison.rows if row.arms == pair]) for pair in names]

    @property
    def sentences(self) -> list[tuple[str, list[str]]]:
        """The sentences of all rows that the answer does not hold, by their reasons."""
        return remaining_sentences(self.comparison.rows, self.comparison.answer)

    @property
    def arm_costs(self) -> list[ArmCost]:
        """Device hours of each arm."""
        return arm_costs(self.costs)

    @property
    def size(self) -> str:
        """How much stands behind the table, in a line."""
        rows, tests = self.comparison.rows, self.comparison.tests
        first = sum(row.primary for row in rows)
        asked = f", {first} of the primary question before the others" if first else ""
        return (
            f"{count(len(rows), 'comparison')}, {count(tests, 'test')} corrected together"
            f" (Holm{asked}), level {self.comparison.alpha:g}"
        )


def gather(
    name: str,
    measurements: Measurements,
    comparison: Comparison,
    study: Study | None = None,
    banners: Sequence[str] = (),
) -> Content:
    """Return the content of a report.

    Args:
        banners: lines that stand on top, such as what is not up to date.
    """
    published = load_published(study.published) if study and study.published else None
    audits = tuple(_audits(measurements))
    trained = tuple(trainings(measurements))
    return Content(
        name=name,
        comparison=comparison,
        trainings=trained,
        costs=tuple(costs(measurements)),
        breakdowns=tuple(breakdowns(measurements)),
        audits=audits,
        floor=tuple(_floor(measurements, audits, comparison.scores)),
        samples=collect_samples(measurements),
        commands=tuple(commands(measurements, study)),
        provenance=tuple(provenance(measurements, study, published)),
        banners=(*banners, *_banners(measurements)),
        published=published,
        curves=_curves(measurements),
        tunings=tuple(tunings(study)) if study else (),
        surfaces=tuple(surfaces(study, comparison, trained)),
    )


_FLOOR = "noise floor"
_SWAPPED = "both orders name the same answer"
_PROBES = PROBES | {"repeated": "verdict changes when asked again"}


def _audits(measurements: Measurements) -> list[Audit]:
    """One audit per evaluation and judge: that of the result with the most judgments; one with
    probes says more than one without.
    """
    best: dict[tuple[str, str], tuple[tuple[bool, int], Audit]] = {}
    for log in (log for arm in measurements.arms.values() for log in arm.logs):
        card, judge = log.audit, log.judge
        if card and judge:
            key = (log.eval, str(judge.fingerprint))
            weight = (bool(card.get("probes")), int(card.get("asked", 0)))
            if key not in best or weight > best[key][0]:
                best[key] = weight, _audit(log, judge, card)
    return [audit for _, audit in best.values()]


def _audit(log: EvalLog, judge: JudgeFacts, card: Scorecard) -> Audit:
    measured = {
        _SWAPPED: card["swap_consistency"],
        "verdicts for the first position (0.5 is fair)": card["first_position"],
        "longer answer wins": card["length"]["longer_wins"],
        "judgments without a verdict": card["unparsed"],
        "verdicts against the judge's own words": card["contradictions"]["interval"],
    }
    for probe, result in (card.get("probes") or {}).items():
        measured[_PROBES.get(probe, probe)] = result["share"]
    if human := card.get("human"):
        measured["agreement with human labels"] = human["verdict_accuracy"]
    numbers = tuple(
        Number(
            kind="judge audit",
            metric=what,
            group=f"{log.eval}, {judge.name}",
            unit="share",
            value=interval["estimate"],
            low=interval["low"],
            high=interval["high"],
            n=interval["n"],
            file=log.place,
        )
        for what, interval in measured.items()
    )
    mode = f"{judge.model}, {judge.mode}"
    return Audit(log.eval, str(judge.name), mode, card["checks"], numbers)


def _floor(
    measurements: Measurements, audits: Sequence[Audit], scores: Sequence[Score]
) -> list[Number]:
    """How much changes where nothing was changed: the judge asked again or in the other order,
    another seed, the same model twice.
    """
    floor = []
    for audit in audits:
        facts = {one.metric: one for one in audit.measured}
        again, same = facts.get(_PROBES["repeated"]), facts[_SWAPPED]
        if again and again.n:
            what = "verdicts that change when the same pair is asked again"
            floor.append(replace(again, kind=_FLOOR, metric=what, group=audit.eval))
        if same.n:
            value, low, high = (1 - (share or 0.0) for share in (same.value, same.high, same.low))
            what = "pairs whose verdict turns with the order"
            turned = replace(same, kind=_FLOOR, metric=what, group=audit.eval)
            floor.append(replace(turned, value=value, low=low, high=high))
    for score in scores:
        means = _seed_means(measurements, score) if score.seeds > 1 else []
        if len(means) > 1:
            mean = sum(means) / len(means)
            floor.append(
                Number(
                    kind=_FLOOR,
                    metric=f"standard deviation between seeds, {score.arm}",
                    group=score.label,
                    unit="points" if score.unit == "share" else score.unit,
                    value=(sum((one - mean) ** 2 for one in means) / (len(means) - 1)) ** 0.5,
                    n=len(means),
                    file=score.files[0],
                )
            )
    return floor


def _seed_means(measurements: Measurements, score: Score) -> list[float]:
    """The mean of each seed's run on one metric, corrected by labels where the score is."""
    means: list[float] = []
    for (_, opponent), measures in measures_of(measurements, score.arm).items():
        if (measures[0].name, opponent) == (score.metric, score.opponent):
            table = corrected_values(measures)
            table = values_of(measures, measures)[0] if table is None else table
            means += [float(np.nanmean(row)) for row in table if not np.isnan(row).all()]
    return means


def _banners(measurements: Measurements) -> list[str]:
    """Lines that stand above the table: runs that are not finished, questions graded without their
    reference.

    What else a result says on top of itself (a weak judge, a failed audit, cut answers, a subset)
    is a finding here, and said there.
    """
    runs = [run for arm in measurements.arms.values() for run in arm.runs]
    without = dict.fromkeys(
        f"{log.eval}: {line}"
        for run in runs
        for log in run.evals
        for line in no_reference(log.missing_references)
    )
    unfinished = [
        f"{run.name} is {run.state['state']}, not finished."
        for run in runs
        if run.state.get("state") in ("failed", "preempted", "running", "created")
    ]
    return [*unfinished, *without]


def _curves(measurements: Measurements) -> Curves:
    """What every run logged, by optimizer step."""
    found: Curves = {key: {} for key in CURVES}
    for name, arm in measurements.arms.items():
        for run in arm.runs:
            for line in run.curves:
                values = {key: line.get(key) for key in CURVES}
                if (loss := line.get("eval_loss")) is not None and loss < 20:
                    values["perplexity"] = math.exp(loss)
                for key, value in values.items():
                    if value is not None and line.get("step") is not None:
                        points = found[key].setdefault(name, {}).setdefault(run.seed, [])
                        points.append((line["step"], float(value)))
    return {key: series for key, series in found.items() if series}
