"""The plan of a whole study: every arm with its seeds, every evaluation, and what that is in card
hours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.planning.advice import advise
from recipes_lib.planning.as_json import plan_json
from recipes_lib.planning.evaluations import EvalTime
from recipes_lib.planning.lengths import Lengths
from recipes_lib.planning.plan import Plan, card_for, plan_launched
from recipes_lib.planning.text import clock, spread, stand_in
from recipes_lib.suites.eval_times import eval_times

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study


@dataclass(frozen=True)
class ArmPlan:
    """One arm that the study trains: its plan, its seeds, and one evaluation of each kind."""

    name: str
    plan: Plan
    seeds: int
    evals: list[EvalTime]

    @property
    def evaluation(self) -> float:
        """Seconds of all evaluations of one run."""
        return sum(item.total for item in self.evals)

    @property
    def card_hours(self) -> float:
        """Card hours of all seeds, trained and evaluated."""
        return self.seeds * (self.plan.gpu_hours + self.evaluation / 3600)


@dataclass(frozen=True)
class StudyHours:
    """All arms, the evaluations of base models, and arms that are not trained here.

    Args:
        unplanned: arm -> why it has no plan; the sums are without it.
        bases: base model -> seconds of its evaluations.
        comparisons: number of head-to-head comparisons: of each pair of arms, and of each arm with
            its base, seed by seed.
        comparing: seconds of judging they take.
    """

    name: str
    arms: list[ArmPlan]
    bases: dict[str, float]
    elsewhere: list[str]
    unplanned: dict[str, str] = field(default_factory=dict)
    comparisons: int = 0
    comparing: float = 0.0

    @property
    def card_hours(self) -> float:
        """Card hours of everything."""
        return (
            sum(arm.card_hours for arm in self.arms)
            + (sum(self.bases.values()) + self.comparing) / 3600
        )

    @property
    def one_after_the_other(self) -> float:
        """Seconds when one thing follows the other."""
        return (
            sum(arm.seeds * (arm.plan.duration.total + arm.evaluation) for arm in self.arms)
            + sum(self.bases.values())
            + self.comparing
        )


def study_hours(study: Study, gpu: str | None = None) -> StudyHours:
    """Return the plan of a study.

    Args:
        gpu: a card's name or `cpu`, for every arm; absent, as for a recipe.
    """
    arms, bases, elsewhere, unplanned = [], {}, [], {}
    counted: dict[
        tuple[str, ...], Lengths
    ] = {}  # arms that differ in other things have the same data, which take longest to count
    for arm in study.arms:
        if not arm.trained or arm.recipe is None:
            elsewhere.append(arm.name)
            continue
        card = card_for(arm.launch, gpu)
        data = (str(arm.recipe.data), str(arm.recipe.model), str(arm.recipe.base_dir))
        try:
            plan = plan_launched(arm.recipe, arm.launch, card, counted.get(data))
        except (
            EnvironmentFault
        ) as fault:  # a model that is not here and whose config the Hub does not give
            unplanned[arm.name] = fault.what
            continue
        if plan.lengths.counted:
            counted[data] = plan.lengths
        evals = eval_times(study.evals, plan.settings.shape, card)
        arms.append(ArmPlan(arm.name, plan, max(1, len(arm.seeds)), evals))
        if study.include_base:
            bases[arm.recipe.model.name_or_path] = sum(item.total for item in evals)
    pairs = len(arms) * (len(arms) - 1) // 2 + (len(arms) if study.include_base else 0)
    comparisons = pairs * max((arm.seeds for arm in arms), default=0)
    places = [
        place for place, recipe in enumerate(study.evals) if recipe.suite.name == "alpaca_eval"
    ]
    comparing = sum(arms[0].evals[place].judging for place in places) * comparisons if arms else 0.0
    return StudyHours(
        study.name, arms, bases, elsewhere, unplanned, comparisons * len(places), comparing
    )


def study_json(plan: StudyHours, price: float | None) -> dict[str, Any]:
    """Return the plan as JSON: each arm as a recipe's plan, and the sums."""
    return {
        "arms": {
            arm.name: {
                "seeds": arm.seeds,
                **plan_json(arm.plan, arm.evals, [], advise(arm.plan), price),
            }
            for arm in plan.arms
        },
        "not_trained_here": plan.elsewhere,
        "not_planned": plan.unplanned,
        "total": {
            "runs": sum(arm.seeds for arm in plan.arms),
            "comparisons": plan.comparisons,
            "train_s": round(sum(arm.seeds * arm.plan.duration.total for arm in plan.arms), 1),
            "evaluation_s": round(
                sum(arm.seeds * arm.evaluation for arm in plan.arms)
                + sum(plan.bases.values())
                + plan.comparing,
                1,
            ),
            "one_after_the_other_s": round(plan.one_after_the_other, 1),
            "gpu_hours": round(plan.card_hours, 4),
            "price_per_gpu_hour": price,
            "cost": None if price is None else round(price * plan.card_hours, 4),
        },
    }


def study_lines(plan: StudyHours, price: float | None) -> Iterator[str]:
    """Yield a table of the arms and the sums."""
    yield f"study {plan.name}"
    width = max([len(name) for name in (*(arm.name for arm in plan.arms), *plan.unplanned)] + [3])
    yield (
        f"{'arm':<{width}}  {'on':<26} {'needs GiB':>9}  {'fits':<4} {'seeds':>5}  {'training':>10}"
        f"  {'evaluation':>10}"
    )
    for arm in plan.arms:
        cpu = arm.plan.settings.device == "cpu"
        card = (
            arm.plan.card.title if cpu else f"{arm.plan.settings.world_size} x {arm.plan.card.name}"
        )
        need = arm.plan.memory.needed * arm.plan.sharing
        times = f"{clock(arm.plan.duration.total):>10}  {clock(arm.evaluation):>10}"
        yield (
            f"{arm.name:<{width}}  {card:<26} {need:>9.1f}  {arm.plan.verdict:<4} {arm.seeds:>5} "
            f" {times}"
        )
    for name, why in plan.unplanned.items():
        yield f"{name:<{width}}  {why}"
    for model, seconds in plan.bases.items():
        yield f"base model {model}: {clock(seconds)} of evaluation"
    if plan.comparisons:
        yield f"{plan.comparisons} comparisons head to head: {clock(plan.comparing)} of judging"
    if plan.elsewhere:
        yield f"not trained here: {', '.join(plan.elsewhere)}"
    device = "cpu" if any(arm.plan.settings.device == "cpu" for arm in plan.arms) else "cuda"
    cost = f", {price * plan.card_hours:,.2f} at {price:g} an hour" if price is not None else ""
    yield (
        f"in all {sum(arm.seeds for arm in plan.arms)} trainings:"
        f" {spread(plan.one_after_the_other, device)} one after the other, {plan.card_hours:.2f}"
        f" card hours{cost}"
    )
    if assumed := next((arm.plan.card for arm in plan.arms if arm.plan.card.stands_in), None):
        yield stand_in(assumed)
    yield (
        "speeds:"
        f" {', '.join(sorted({arm.plan.card.basis for arm in plan.arms})) or 'nothing to plan'}"
    )
