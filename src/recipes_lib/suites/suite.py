"""What every suite is, something that asks loaded models, and what tables of results share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from recipes_lib.config.json_schema import JsonSchema
from recipes_lib.config.kinds import at
from recipes_lib.eval_log import EvalLog
from recipes_lib.eval_recipe import SUITE_FACTS, EvalRecipe
from recipes_lib.generation.targets import Target, asking_of, find_targets

if TYPE_CHECKING:
    from recipes_lib.generation.subjects import Subject
    from recipes_lib.statistics.intervals import StoredInterval


class Asker:
    """What asks loaded models something: a suite, or a check of them.

    A model that fails a gate (`is_gate`) is asked nothing else. `served` says that a server has the
    models, so that no weights are loaded.
    """

    recipe: EvalRecipe
    is_gate = False
    served = False

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = list(targets)

    def visit(self, subject: Subject) -> list[EvalLog]:
        """Ask one of `targets`, and return the logs that are there at once."""
        raise NotImplementedError

    def has(self, target: Target) -> bool:
        """Whether a target is (still) to be asked."""
        return any(str(one.identity) == str(target.identity) for one in self.targets)

    def drop(self, target: Target) -> None:
        """Leave a target out."""
        self.targets = [one for one in self.targets if str(one.identity) != str(target.identity)]


class Suite(Asker):
    """What an eval recipe runs: what it asks, what it makes of the answers, and its table.

    Args:
        words: targets as typed: runs, models, `base`.
        remote_code: whether the command line allowed code that ships with a model.

    Raises:
        RecipeError: a word is no target.
    """

    HELP: ClassVar[str]  # what it does, for the schema of eval recipes
    TITLE: ClassVar[str]  # its name in tables and in the labels of its metrics
    NUMBERS: ClassVar[dict[str, JsonSchema]]  # key of a result -> its schema

    def __init__(self, recipe: EvalRecipe, words: Sequence[str], remote_code: bool = False) -> None:
        self.recipe = recipe
        super().__init__(find_targets(words, asking_of(recipe, remote_code)))

    @staticmethod
    def table(logs: Sequence[EvalLog]) -> list[str]:
        """Return the lines of a table of logs."""
        raise NotImplementedError


def suite_class(name: str) -> type[Suite]:
    """Return the class of a suite by its name in eval recipes, imported now."""
    kind: type[Suite] = at(SUITE_FACTS[name].place)
    return kind


def footer(logs: Sequence[EvalLog]) -> list[str]:
    """Return the lines below a judged suite's table: about the judge, then about the answers."""
    return [*map(_judge_line, logs), *map(_answer_line, logs)]


def _judge_line(log: EvalLog) -> str:
    card = log.audit
    assert card is not None
    consistent = (
        ""
        if not card["swap_consistency"]["n"]
        else (
            f"orders agree {percent_interval(card['swap_consistency'])}, Response A wins"
            f" {percent_interval(card['first_position'])}, "
        )
    )
    checks = [check["result"] for check in card["checks"]]
    mass = "" if card["mean_mass"] is None else f"verdict mass {card['mean_mass']:.3f}, "
    states = (
        f"{checks.count('pass')} pass, {checks.count('fail')} fail, {checks.count('not measured')}"
        " not measured"
    )
    return f"judge on {log.target}: {consistent}{mass}audit {states}"


def _answer_line(log: EvalLog) -> str:
    answers, speed = log.answers.answers, log.answers.generated_now
    assert answers is not None
    looping = f", {answers.loops} in a loop" if answers.loops else ""
    timed = speed is not None and speed.seconds
    made = f", {speed.new_tokens / speed.seconds:.0f} tokens/s" if speed and timed else ""
    return (
        f"answers of {log.target}: {answers.n}, {answers.empty} empty, {answers.cut} cut,"
        f" {answers.identical.count} identical{looping}{made}"
    )


def percent(value: float | None) -> str:
    """Return a share in percent."""
    return "n/a" if value is None else f"{100 * value:.1f}%"


def percent_interval(value: StoredInterval) -> str:
    """Return a share with its interval in percent, its limits cut to 0 and 100."""
    low, high = value["low"], value["high"]
    if value["estimate"] is None or low is None or high is None:
        return percent(value["estimate"])
    return f"{percent(value['estimate'])} [{100 * max(low, 0):.1f}, {100 * min(high, 1):.1f}]"


def interval(value: StoredInterval, digits: int = 2) -> str:
    """Return a number with its interval."""
    low, high = number(value["low"], digits), number(value["high"], digits)
    limits = "" if value["low"] is None else f" [{low}, {high}]"
    return f"{number(value['estimate'], digits)}{limits}"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with so many digits after the point."""
    return "n/a" if value is None else f"{value:.{digits}f}"
