"""The results of evaluations: completed, written into their runs, and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from recipes_lib.core.environment import command_line, git_state, library_versions
from recipes_lib.core.files import utc_now
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import count, say
from recipes_lib.evals.leaks import leaks_of_run
from recipes_lib.evals.log import SAME, EvalLog, write_log
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.evals.suites import suite_class

_MOST = 0.1  # share of the answers that may have a fault without a banner


def write_result(recipe: EvalRecipe, log: EvalLog) -> EvalLog:
    """Complete a log with what is the same for every suite, and write it into its run."""
    leaks = leaks_of_run(recipe, log)
    banners: list[str] = []
    if leaks and leaks.is_error:
        banners.append(leaks.summary(recipe.name))
    banners += log.banners
    for fault, (faulty, n) in log.faults.items():
        limit = _MOST * n
        if fault == SAME:  # two answers that are alike say nothing, however few there are
            limit = max(2.0, limit)
        if faulty > limit:
            banners.append(f"{faulty} of {n} answers {fault}")
    if log.subset:
        banners.append(log.subset)
    metrics = [
        replace(metric, eval=log.eval, suite=log.suite, file=log.file) for metric in log.metrics
    ]
    log = replace(
        log,
        metrics=tuple(metrics),
        leaks=leaks,
        banners=tuple(banners),
        settings=recipe.settings_key(),
        written=utc_now(),
        git=dict(git_state()),
        libraries=library_versions(),
        recipe=recipe.to_dict(),
        command=command_line(),
    )
    write_log(log)
    return log


def say_results(logs: Sequence[EvalLog]) -> None:
    """Print the tables of results, eval after eval, and where they are kept."""
    for name in dict.fromkeys(log.eval for log in logs):
        logs_of_eval = [log for log in logs if log.eval == name]
        first = logs_of_eval[0]
        suite = suite_class(first.suite)
        decided_by = suite.title
        if first.judge:
            decided_by = f"judge {first.judge.model} ({first.judge.mode})"
        lines = [f"{name}: {count(first.n, 'question')}, {decided_by}", ""]
        for log in logs_of_eval:  # what must be read before the numbers
            lines += [f"! {log.target}: {text}" for text in log.banners]
            lines += [f"  {log.target}: {text}" for text in log.notes]
        lines += ["", *suite.table(logs_of_eval)]
        lines += [f"$ {log.lm_eval_command}" for log in logs_of_eval if log.lm_eval_command]
        say(*lines, "")
    for log in logs:
        say(f"kept in {shown_path(log.file)}")
