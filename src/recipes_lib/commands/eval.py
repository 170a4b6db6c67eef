"""`recipes eval EVAL... RUN_OR_MODEL...`: answer an eval's questions, judge, and print a table."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Annotated

from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import next_step, print_json


def run(
    eval: Annotated[str, "an eval recipe, for example evals/quickstart/alpaca_eval.yaml, or more"],
    run_or_model: Annotated[list[str], "runs, base, Hub ids, model folders, or files of answers"],
    overrides: Sequence[str] = (),
    *,
    against: Annotated[str | None, "the opponent: reference, base, another run or model"] = None,
    trust_remote_code: Annotated[
        bool, "allow code of models and tasks, if the recipe asks"
    ] = False,
    json: Annotated[bool, "print one JSON object: result.json, or a list of them"] = False,
) -> int:
    """Evaluate and print."""
    from recipes_lib.evals.log import to_json
    from recipes_lib.evals.run import evaluate, say_results, split_words

    recipes, words = split_words([eval, *run_or_model], list(overrides))
    with contextlib.redirect_stdout(sys.stderr if json else sys.stdout):
        logs = evaluate(recipes, words, against, remote_code=trust_remote_code)
    if json:
        results = [{**to_json(log), "file": shown_path(log.file)} for log in logs]
        return print_json(results[0] if len(results) == 1 else {"results": results})
    say_results(logs)
    targets = dict.fromkeys(log.target for log in logs)
    judged = [log.file for log in logs if log.judge]
    if judged and len(targets) == 1:
        name = judged[0].name.replace("result", "judgments", 1)
        file = judged[0].with_name(name).with_suffix(".jsonl")
        return next_step("recipes", "judge", "audit", shown_path(file))
    return next_step("recipes", "compare", *targets)
