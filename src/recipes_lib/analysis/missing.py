"""Checks of what a comparison lacks: trainings and results that are not finished or not read, and
questions that were not asked.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

from recipes_lib.analysis.findings import Finding
from recipes_lib.analysis.runs import Arms, run_place
from recipes_lib.analysis.text import sentence_list
from recipes_lib.evals.log import EvalLog

_UNFINISHED = ("failed", "stopped", "running", "created")


def check_presence(arms: Arms) -> Iterator[Finding]:
    """Yield trainings and evaluations that are not finished, and results that were not read."""
    for arm in arms:
        for run in arm.runs:
            folder = run_place(run.folder)
            state = run.state.get("state")
            if state in _UNFINISHED and run.evals:
                yield Finding(
                    code="not-finished",
                    severity="error",
                    title=f"{run.name} is {state}, not finished, and was evaluated",
                    evidence=(folder,),
                    remedy="finish it, and evaluate again",
                    arms=(arm.name,),
                )
            if run.unfinished:
                yield Finding(
                    code="unfinished-evaluation",
                    severity="warning",
                    title=f"{arm.name} has no result of {sentence_list(run.unfinished)}",
                    evidence=(folder,),
                    remedy="the same recipes eval command finishes it and asks nothing twice",
                    arms=(arm.name,),
                )
            if run.unread:
                yield Finding(
                    code="not-read",
                    severity="warning",
                    title=f"Some results of {arm.name} are not in this comparison",
                    evidence=run.unread,
                    remedy="choosing among results after a look makes chance look like an effect",
                    arms=(arm.name,),
                )


def check_subsets(arms: Arms) -> Iterator[Finding]:
    """Yield evaluations that asked only some of their questions."""
    logs_of: dict[str, list[tuple[str, EvalLog]]] = defaultdict(list)
    for arm, log in arms.logs:
        logs_of[log.eval].append((arm, log))
    for name, logs in logs_of.items():
        subsets = [f"{arm}: {log.subset}" for arm, log in logs if log.subset]
        if not subsets:
            continue
        is_chosen = any((log.recipe.get("suite") or {}).get("samples") for _, log in logs)
        metrics = itertools.chain(*(log.metric_names for _, log in logs))
        title = f"{name} asked only some of its questions"
        remedy = "ask all of them"
        if is_chosen:
            title = f"The questions of {name} were chosen"
            remedy = "ask all of them: who can choose the questions can choose the answer"
        yield Finding(
            code="chosen-questions" if is_chosen else "subset",
            severity="error" if is_chosen else "warning",
            title=title,
            evidence=tuple(dict.fromkeys(subsets)),
            remedy=remedy,
            metrics=tuple(dict.fromkeys(metrics)),
        )
