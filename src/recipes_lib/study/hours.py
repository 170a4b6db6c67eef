"""The plan of a whole study: every arm with its seeds, every evaluation, and what that is in card
hours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from recipes_lib.compare.design import Study
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.planning.as_json import plan_json
from recipes_lib.planning.lengths import Lengths
from recipes_lib.planning.plan import Plan, card_for, plan_launched
from recipes_lib.planning.text import clock, cost, spread, stand_in


@dataclass(frozen=True)
class ArmPlan:
    """One arm that the study trains: its plan, with one evaluation of each kind, its seeds, and the
    plans of the trainings that tune it, by their names.
    """

    name: str
    plan: Plan
    seeds: int
    tuning: Mapping[str, Plan] = field(default_factory=dict)

    @property
    def trainings(self) -> int:
        """How many trainings it takes."""
        return self.seeds + len(self.tuning)

    @property
    def training(self) -> float:
        """Seconds of all of them."""
        tuning = sum(plan.duration.total for plan in self.tuning.values())
        return self.seeds * self.plan.duration.total + tuning


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
    unplanned: dict[str, str]
    comparisons: int
    comparing: float
    price: float | None

    @property
    def training(self) -> float:
        """Seconds of all trainings."""
        return sum(arm.training for arm in self.arms)

    @property
    def evaluation(self) -> float:
        """Seconds of all evaluations and comparisons."""
        of_arms = sum(arm.seeds * arm.plan.evaluation for arm in self.arms)
        return of_arms + sum(self.bases.values()) + self.comparing

    @property
    def card_hours(self) -> float:
        """Card hours of everything."""
        of_arms = sum(arm.seeds * arm.plan.card_hours for arm in self.arms)
        of_arms += sum(plan.card_hours for arm in self.arms for plan in arm.tuning.values())
        return of_arms + (sum(self.bases.values()) + self.comparing) / 3600


def study_hours(study: Study, gpu: str | None = None, price: float | None = None) -> StudyHours:
    """Return the plan of a study.

    Args:
        gpu: a card's name or `cpu`, for every arm; absent, as for a recipe.
        price: of one card for one hour, in any currency; None for no cost.
    """
    arms, bases, elsewhere, unplanned = [], {}, [], {}
    # arms that differ in other things have the same data, which take longest to count
    counted: dict[tuple[str, ...], Lengths] = {}
    for arm in study.arms:
        if not arm.trained or arm.recipe is None:
            elsewhere.append(arm.name)
            continue
        card = card_for(arm.launch, gpu)
        data = (str(arm.recipe.data), str(arm.recipe.model))
        try:
            plan = plan_launched(arm.recipe, arm.launch, card, counted.get(data))
        except EnvironmentFault as fault:  # the model is not here and the Hub gives no config
            unplanned[arm.name] = fault.what
            continue
        if plan.lengths.counted:
            counted[data] = plan.lengths
        tuning = {
            one.name: plan_launched(one.recipe, one.launch, card, counted.get(data))
            for one in (arm.tuning.candidates if arm.tuning else ())
            if one.recipe is not None
        }
        plan = replace(plan, price=price)
        arms.append(ArmPlan(arm.name, plan, max(1, len(arm.seeds)), tuning))
        if study.include_base and plan.evals:
            bases[arm.recipe.model.name_or_path] = plan.evaluation
    pairs = len(arms) * (len(arms) - 1) // 2 + (len(arms) if study.include_base else 0)
    pairs *= max((arm.seeds for arm in arms), default=0)
    compared = [recipe.name for recipe in study.evals if recipe.suite.name == "alpaca_eval"]
    first = arms[0].plan.evals if arms else ()
    judging = sum(item.judging for item in first if item.name in compared)
    comparisons = pairs * len(compared)
    return StudyHours(
        study.name, arms, bases, elsewhere, unplanned, comparisons, judging * pairs, price
    )


def study_json(plan: StudyHours) -> dict[str, object]:
    """Return the plan as JSON: each arm as a recipe's plan, and the sums."""
    return {
        "arms": {
            arm.name: {
                "seeds": arm.seeds,
                **({"tuning": len(arm.tuning)} if arm.tuning else {}),
                **plan_json(arm.plan, methods=False),
            }
            for arm in plan.arms
        },
        "not_trained_here": plan.elsewhere,
        "not_planned": plan.unplanned,
        "total": {
            "runs": sum(arm.trainings for arm in plan.arms),
            "comparisons": plan.comparisons,
            "train_s": round(plan.training, 1),
            "evaluation_s": round(plan.evaluation, 1),
            "one_after_the_other_s": round(plan.training + plan.evaluation, 1),
            "gpu_hours": round(plan.card_hours, 4),
            "price_per_gpu_hour": plan.price,
            "cost": None if plan.price is None else round(plan.price * plan.card_hours, 4),
        },
    }


def study_lines(plan: StudyHours) -> Iterator[str]:
    """Yield a table of the arms and the sums."""
    yield f"study {plan.name}"
    width = max([len(name) for name in (*(arm.name for arm in plan.arms), *plan.unplanned)] + [3])
    yield (
        f"{'arm':<{width}}  {'on':<26} {'needs GiB':>9}  {'fits':<4} {'seeds':>5}  {'training':>10}"
        f"  {'evaluation':>10}"
    )
    for name, one, seeds in ((arm.name, arm.plan, arm.seeds) for arm in plan.arms):
        cpu = one.settings.device == "cpu"
        card = one.card.title if cpu else f"{one.settings.world_size} x {one.card.name}"
        evaluation = clock(one.evaluation) if one.evals else "-"
        yield (
            f"{name:<{width}}  {card:<26} {one.needed:>9.1f}  {one.verdict:<4} {seeds:>5} "
            f" {clock(one.duration.total):>10}  {evaluation:>10}"
        )
    for name, why in plan.unplanned.items():
        yield f"{name:<{width}}  {why}"
    for model, seconds in plan.bases.items():
        yield f"base model {model}: {clock(seconds)} of evaluation"
    if plan.comparisons:
        judging = f": {clock(plan.comparing)} of judging" if plan.comparing else ""
        yield f"{plan.comparisons} comparisons head to head{judging}"
    if plan.elsewhere:
        yield f"not trained here: {', '.join(plan.elsewhere)}"
    device = "cpu" if any(arm.plan.settings.device == "cpu" for arm in plan.arms) else "cuda"
    tuned = sum(len(arm.tuning) for arm in plan.arms)
    tuning = f" ({tuned} of them to tune)" if tuned else ""
    without = "" if plan.evaluation else " without evaluations"
    yield (
        f"in all {sum(arm.trainings for arm in plan.arms)} trainings{tuning}:"
        f" {spread(plan.training + plan.evaluation, device)} one after the other,"
        f" {plan.card_hours:.2f} card hours{without}{cost(plan.card_hours, plan.price)}"
    )
    plans = [arm.plan for arm in plan.arms]
    if assumed := next((one.card for one in plans if one.card.stands_in), None):
        yield stand_in(assumed)
    yield f"speeds: {', '.join(sorted({one.basis for one in plans})) or 'nothing to plan'}"
