"""What every suite is, something that asks loaded models, and what tables of results share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recipes_lib.generation.targets import Target

if TYPE_CHECKING:
    from recipes_lib.eval_log import EvalLog
    from recipes_lib.eval_recipe import EvalRecipe
    from recipes_lib.generation.subjects import Subject


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


def footer(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines below a judged suite's table: about the judge, then about the answers."""
    return [*map(_judge_line, results), *map(_answer_line, results)]


def _judge_line(result: dict[str, Any]) -> str:
    card = result["audit"]
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
    return f"judge on {result['target']}: {consistent}{mass}audit {states}"


def _answer_line(result: dict[str, Any]) -> str:
    answers, speed = result["answers"]["answers"], result["answers"]["generated_now"]
    same = answers["identical"]["count"]
    looping = f", {answers['loops']} in a loop" if answers["loops"] else ""
    made = (
        ""
        if not speed or not speed["seconds"]
        else f", {speed['new_tokens'] / speed['seconds']:.0f} tokens/s"
    )
    return (
        f"answers of {result['target']}: {answers['n']}, {answers['empty']} empty, {answers['cut']}"
        f" cut, {same} identical{looping}{made}"
    )


def percent(value: float | None) -> str:
    """Return a share in percent."""
    return "n/a" if value is None else f"{100 * value:.1f}%"


def percent_interval(value: dict[str, Any]) -> str:
    """Return a share with its interval in percent, its limits cut to 0 and 100."""
    if value["estimate"] is None:
        return "n/a"
    limits = (
        ""
        if value["low"] is None
        else f" [{100 * max(value['low'], 0):.1f}, {100 * min(value['high'], 1):.1f}]"
    )
    return f"{percent(value['estimate'])}{limits}"


def interval(value: dict[str, Any], digits: int = 2) -> str:
    """Return a number with its interval."""
    low, high = (number(value[end], digits) for end in ("low", "high"))
    limits = "" if value["low"] is None else f" [{low}, {high}]"
    return f"{number(value['estimate'], digits)}{limits}"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with so many digits after the point."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
