"""Results of the format before `evals.log`, as its logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from recipes_lib import eval_log as old
from recipes_lib.core.json_files import DamagedFile
from recipes_lib.eval_files import read_evals
from recipes_lib.evals.log import (
    AnswerFacts,
    AnswerFaults,
    Check,
    EvalLog,
    JudgeFacts,
    Metric,
    Sample,
    Scorecard,
)

_SAMPLE = {one.name for one in fields(Sample)} & {one.name for one in fields(old.Sample)}


def read_old_logs(
    run: Path, report: Callable[[DamagedFile], None] | None = None
) -> tuple[tuple[EvalLog, ...], tuple[str, ...]]:
    """Return a run's evaluations, as `read_eval_logs` does."""
    logs, unfinished = read_evals(run, report)
    return tuple(map(_log, logs)), unfinished


def _log(log: old.EvalLog) -> EvalLog:
    card = log.audit or {}
    checks = tuple(
        Check(
            check=check["check"],
            value=check["value"],
            needs=check["needs"],
            result=check["result"],  # type: ignore[arg-type]
        )
        for check in card.get("checks") or ()
    )
    judge = (
        {key: value for key, value in vars(log.judge).items() if value is not None}
        if log.judge
        else {}
    )
    return EvalLog(
        suite=log.suite,
        eval=log.eval,
        target=log.target,
        against=log.against,
        n=log.n or 0,
        subset=log.subset,
        metrics=tuple(_metric(measure, log) for measure in log.measures),
        answers=_answers(log.answers),
        opponent=_answers(log.opponent) if log.opponent else None,
        judge=JudgeFacts(**judge) if log.judge else None,
        audit=Scorecard(asked=card.get("asked", 0), checks=checks) if card else None,
        leaks=log.leaks,
        recipe=dict(log.recipe),
        command=log.command or "",
        lm_eval_command=log.lm_eval_command,
        git=dict(log.git),
        libraries=dict(log.libraries),
        file=log.file,
    )


def _metric(measure: old.Measure, log: old.EvalLog) -> Metric:
    tasks = [one for one in log.tasks if one.task == measure.task]
    return Metric(
        measure.metric,
        measure.label,
        tuple(Sample(**{name: getattr(one, name) for name in _SAMPLE}) for one in measure.samples),
        task=measure.task,
        opponent=measure.opponent,
        unit=measure.unit,  # type: ignore[arg-type]
        higher_is_better=measure.higher_is_better,
        value=measure.reported,
        n=measure.reported_n or 0,
        instead_of=measure.instead_of,
        parts=measure.parts,
        num_fewshot=tasks[0].num_fewshot if tasks else None,
        version=str(tasks[0].version) if tasks else None,
        eval=measure.eval,
        suite=measure.suite,
        file=measure.file,
    )


def _answers(facts: old.AnswerFacts) -> AnswerFacts:
    faults = facts.answers
    known: dict[str, Any] = {
        "name": facts.name or "",
        "models": tuple(facts.models),
        "fingerprint": facts.fingerprint or "",
        "tokens": facts.tokens,
    }
    same = ("prompt_format", "prompt_format_hash", "decoding", "dtype", "quantized")
    known |= {name: getattr(facts, name) for name in same}
    if faults:
        known["faults"] = AnswerFaults(
            n=faults.n,
            empty=faults.empty,
            cut=faults.cut,
            identical=faults.identical.count,
            loops=faults.loops or 0,
        )
    return AnswerFacts(**known)
