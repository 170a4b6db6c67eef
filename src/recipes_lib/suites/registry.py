"""The suites there are, by the name in `suite.name` of an eval recipe, and the tables of their
results for the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes_lib.core.terminal import say
from recipes_lib.suites.alpaca_eval import AlpacaEval
from recipes_lib.suites.harness import Harness
from recipes_lib.suites.mt_bench import MTBench

# A suite is made of a recipe, words, an opponent and what the command line allows; it has
# `targets`, `served`, `visit(subject)`, `results` and `table(results)`. A suite that a judge
# decides is a `JudgedSuite`.
SUITES: dict[str, type[AlpacaEval] | type[MTBench] | type[Harness]] = {
    "alpaca_eval": AlpacaEval,
    "mt_bench": MTBench,
    "lm_eval": Harness,
}


def say_results(results: Sequence[dict[str, Any]]) -> None:
    """Print the tables of results, eval after eval, and where they are kept."""
    for name in dict.fromkeys(result["eval"] for result in results):
        mine = [result for result in results if result["eval"] == name]
        say(tables(mine))
        for result in mine:
            if command := result.get("lm_eval_command"):
                say(f"$ {command}")
        say()
    for result in results:
        say(f"kept in {result['file']}")


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables of results of one suite."""
    lines = [f"{results[0]['eval']}: {_what(results[0])}", ""]
    said: dict[str, list[str]] = {}
    for result in results:
        for banner in result["banners"]:
            said.setdefault(banner, []).append(result["target"])
    for banner, targets in said.items():
        lines.append(
            f"! {banner}" if len(targets) == len(results) else f"! {', '.join(targets)}: {banner}"
        )
    lines += [""] if said else []
    lines += SUITES[results[0]["suite"]].table(results)
    return "\n".join(lines)


def _what(result: dict[str, Any]) -> str:
    if result["suite"] == "lm_eval":
        return "lm-eval"
    judge = result["judge"]
    return f"{result['n']} questions, judge {judge['name']} ({judge['model']}, {judge['mode']})"
