"""What a report holds, gathered once for all its forms. Every number has its n and the file it
comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.claims import remaining_sentences
from recipes_lib.compare.table import Score, TableRow
from recipes_lib.compare.wording import count
from recipes_lib.report.breakdowns import Breakdown, breakdowns
from recipes_lib.report.provenance import commands, provenance
from recipes_lib.report.runs import RunCost, Training, costs, trainings
from recipes_lib.report.samples import SampleSet, collect_samples
from recipes_lib.suites.questions import no_reference

if TYPE_CHECKING:
    from recipes_lib.compare.claims import Comparison
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements
    from recipes_lib.compare.published import Published


Curves = dict[
    str, dict[str, dict[int | None, list[tuple[float, float]]]]
]  # points (step, value) by curve, arm and seed


@dataclass(frozen=True)
class Audit:
    """A judge's audit over the judgments of one evaluation: the checks, and what was measured, a
    line each.
    """

    eval: str
    judge: str
    model: str
    runs: tuple[str, ...]
    checks: tuple[dict[str, Any], ...]
    measured: tuple[tuple[str, dict[str, Any]], ...]
    file: str


@dataclass(frozen=True)
class NoiseFloor:
    """One number of the noise floor: how much changes where nothing was changed."""

    what: str
    where: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    file: str


@dataclass(frozen=True)
class Content:
    """Everything that a report shows."""

    name: str
    comparison: Comparison
    trainings: tuple[Training, ...]
    costs: tuple[RunCost, ...]
    breakdowns: tuple[Breakdown, ...]
    audits: tuple[Audit, ...]
    floor: tuple[NoiseFloor, ...]
    samples: SampleSet
    commands: tuple[tuple[str, tuple[str, ...]], ...]
    provenance: tuple[tuple[str, str], ...]
    banners: tuple[str, ...]
    imported: tuple[str, ...]
    published: Published | None
    curves: Curves = field(repr=False, default_factory=dict)

    @property
    def question(self) -> str:
        """What the study asks."""
        return self.comparison.question

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
    def scores(self) -> Sequence[Score]:
        """Every arm's score."""
        return self.comparison.scores


def gather(
    name: str,
    measurements: Measurements,
    comparison: Comparison,
    study: Study | None = None,
    published: Published | None = None,
    banners: Sequence[str] = (),
) -> Content:
    """Return the content of a report.

    Args:
        banners: lines that stand on top, such as what is not up to date.
    """
    return Content(
        name=name,
        comparison=comparison,
        trainings=tuple(trainings(measurements)),
        costs=tuple(costs(measurements)),
        breakdowns=tuple(breakdowns(measurements)),
        audits=tuple(_audits(measurements)),
        floor=tuple(_floor(measurements, comparison.scores)),
        samples=collect_samples(measurements),
        commands=tuple(commands(name, measurements, study)),
        provenance=tuple(provenance(measurements, study, published)),
        banners=(*banners, *_banners(measurements)),
        imported=tuple(arm for arm, one in measurements.arms.items() if one.imported),
        published=published,
        curves=_curves(measurements),
    )


def _audits(measurements: Measurements) -> list[Audit]:
    """One audit per evaluation and judge: that of the result with the most judgments."""
    best: dict[tuple[str, str], tuple[int, Audit]] = {}
    seen: dict[tuple[str, str], list[str]] = {}
    for arm in measurements.arms.values():
        for run in arm.runs:
            for result in run.evals:
                card, judge = result.result.get("audit"), result.result.get("judge")
                if not card or not judge:
                    continue
                key = (result.eval, str(judge.get("fingerprint")))
                seen.setdefault(key, []).append(run.name)
                # The result with probes says more than one without; then the one with more
                # judgments.
                weight = (100_000_000 if card.get("probes") else 0) + int(card.get("asked", 0))
                if key not in best or weight > best[key][0]:
                    best[key] = (
                        weight,
                        _audit(result.eval, judge, card, "/".join(result.file.parts[-4:])),
                    )
    return [
        Audit(
            audit.eval,
            audit.judge,
            audit.model,
            tuple(dict.fromkeys(seen[key])),
            audit.checks,
            audit.measured,
            audit.file,
        )
        for key, (_, audit) in best.items()
    ]


_PROBES = {
    "empty": "empty answer loses",
    "truncated": "truncated answer loses",
    "identical": "identical pair ties",
    "swapped": "probe pairs consistent",
    "injected": "injected verdict flips",
    "repeated": "verdict changes when asked again",
}


def _audit(name: str, judge: dict[str, Any], card: dict[str, Any], file: str) -> Audit:
    measured = [
        ("both orders name the same answer", card["swap_consistency"]),
        ("verdicts for the first position (0.5 is fair)", card["first_position"]),
        ("longer answer wins", card["length"]["longer_wins"]),
        ("judgments without a verdict", card["unparsed"]),
        ("verdicts against the judge's own words", card["contradictions"]["interval"]),
        *(
            (_PROBES.get(probe, probe), result["share"])
            for probe, result in (card.get("probes") or {}).items()
        ),
    ]
    if card.get("human"):
        measured.append(("agreement with human labels", card["human"]["verdict_accuracy"]))
    mode = f"{judge.get('model')}, {judge.get('mode')}"
    return Audit(
        name, str(judge.get("name")), mode, (), tuple(card["checks"]), tuple(measured), file
    )


def _floor(measurements: Measurements, scores: Sequence[Score]) -> list[NoiseFloor]:
    """How much changes where nothing was changed: the judge asked again or in the other order,
    another seed, the same model twice.
    """
    floor = []
    for audit in _audits(measurements):
        facts = dict(audit.measured)
        again = facts.get(_PROBES["repeated"])
        if again and again["n"]:
            floor.append(
                NoiseFloor(
                    "verdicts that change when the same pair is asked again",
                    audit.eval,
                    *_limits(again),
                    "share",
                    audit.file,
                )
            )
        same = facts["both orders name the same answer"]
        if same["n"]:
            turned = {
                "estimate": 1 - same["estimate"],
                "low": 1 - same["high"],
                "high": 1 - same["low"],
                "n": same["n"],
            }
            floor.append(
                NoiseFloor(
                    "pairs whose verdict turns with the order",
                    audit.eval,
                    *_limits(turned),
                    "share",
                    audit.file,
                )
            )
    by_seed = [score for score in scores if score.seeds > 1]
    for score in by_seed:
        values = _seed_means(measurements, score)
        if len(values) > 1:
            mean = sum(values) / len(values)
            spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
            what = f"standard deviation between seeds, {score.arm}"
            unit = "points" if score.unit == "share" else score.unit
            floor.append(
                NoiseFloor(what, score.label, spread, None, None, len(values), unit, score.files[0])
            )
    return floor


def _limits(interval: dict[str, Any]) -> tuple[float | None, float | None, float | None, int]:
    return interval["estimate"], interval["low"], interval["high"], interval["n"]


def _seed_means(measurements: Measurements, score: Score) -> list[float]:
    """The mean of each seed's run on one metric."""
    means = []
    for run in measurements.arms[score.arm].runs:
        for measure in run.measures():
            if (
                measure.name == score.metric
                and measurements.opponent_name(measure.opponent) == score.opponent
            ):
                values = [item.value for item in measure.samples if item.value is not None]
                means += [sum(values) / len(values)] if values else []
    return means


def _banners(measurements: Measurements) -> list[str]:
    """Lines that stand above the table: runs that are not finished, questions graded without their
    reference.

    What else a result says on top of itself (a weak judge, a failed audit, cut answers, a subset)
    is a finding here, and said there.
    """
    lines = []
    without: dict[str, None] = {}
    for arm in measurements.arms.values():
        for run in arm.runs:
            if run.state.get("state") in ("failed", "preempted", "running", "created"):
                lines.append(f"{run.name} is {run.state['state']}, not finished.")
            for result in run.evals:
                without |= {
                    f"{result.eval}: {line}": None
                    for line in no_reference(result.result.get("missing_references") or ())
                }
    return [*lines, *without]


CURVES = {
    "loss": ("loss", "training loss per token"),
    "eval_loss": ("validation_loss", "validation loss per token"),
    "perplexity": ("validation_perplexity", "validation perplexity"),
    "learning_rate": ("learning_rate", "learning rate"),
    "tokens_per_second": ("throughput", "tokens per second"),
    "peak_memory_gib": ("memory", "peak memory, GiB"),
}


def _curves(measurements: Measurements) -> Curves:
    """What every run logged, by optimizer step."""
    import math

    found: Curves = {}
    for name, arm in measurements.arms.items():
        for run in arm.runs:
            for line in run.curves:
                values = {key: line.get(key) for key in CURVES}
                if (loss := line.get("eval_loss")) is not None and loss < 20:
                    values["perplexity"] = math.exp(loss)
                for key, value in values.items():
                    if value is not None and line.get("step") is not None:
                        points = (
                            found.setdefault(key, {}).setdefault(name, {}).setdefault(run.seed, [])
                        )
                        points.append((line["step"], float(value)))
    return {key: found[key] for key in CURVES if key in found}


def size_text(content: Content) -> str:
    """Return how much stands behind the table, in a line."""
    tests = count(content.comparison.tests, "test")
    return (
        f"{count(len(content.comparison.rows), 'comparison')}, {tests} corrected together (Holm),"
        f" level {content.comparison.alpha:g}"
    )
