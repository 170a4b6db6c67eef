"""The results of evaluations: completed, written into their runs, and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from recipes_lib.core.environment import command_line, git_state, library_versions
from recipes_lib.core.files import utc_now
from recipes_lib.core.project import shown_path
from recipes_lib.core.terminal import count, say
from recipes_lib.evals.leaks import leaks_of_run
from recipes_lib.evals.log import SAME, EvalLog, answer_faults, write_log
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
    banners += _fault_banners(log)
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


def _fault_banners(log: EvalLog) -> list[str]:
    """Return the faults that too many answers have."""
    banners = []
    for fault, (faulty, n) in answer_faults(log).items():
        limit = _MOST * n
        if fault == SAME:  # two answers that are alike say nothing, however few there are
            limit = max(2.0, limit)
        if faulty > limit:
            banners.append(f"{faulty} of {n} answers {fault}")
    return banners


def say_results(logs: Sequence[EvalLog]) -> None:
    """Print the tables of results, eval after eval, and where they are kept."""
    for name in dict.fromkeys(log.eval for log in logs):
        say(*_lines_of_eval(name, [log for log in logs if log.eval == name]), "")
    for log in logs:
        say(f"kept in {shown_path(log.file)}")


def _lines_of_eval(name: str, logs: Sequence[EvalLog]) -> list[str]:
    """Return what is printed of one eval: what must be read first, then the table."""
    suite = suite_class(logs[0].suite)
    judge = logs[0].judge
    decided_by = suite.title
    if judge:
        decided_by = f"judge {judge.model} ({judge.mode})"
    lines = [f"{name}: {count(logs[0].n, 'question')}, {decided_by}", ""]
    for log in logs:
        lines += [f"! {log.target}: {text}" for text in log.banners]
        lines += [f"  {log.target}: {text}" for text in log.notes]
    lines += ["", *suite.table(logs)]
    lines += [f"$ {log.lm_eval_command}" for log in logs if log.lm_eval_command]
    return lines
