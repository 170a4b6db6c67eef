"""What an evaluation recorded about how its answers and verdicts were computed."""

from __future__ import annotations

from typing import Any

from recipes_lib.analysis.differences import code_text
from recipes_lib.evals.engines import ENGINES
from recipes_lib.evals.log import EvalLog
from recipes_lib.evals.recipe import Thresholds


def computing_facts(log: EvalLog, precision: bool) -> dict[str, Any]:
    """Return what computed the answers and the verdicts; what is not known is absent."""
    answers = log.answers
    judge = log.judge
    facts: dict[str, Any] = dict(log.libraries)
    if log.suite != "lm_eval":
        facts.pop("lm_eval", None)  # it is installed, and measured nothing here
    engine = answers.engine or (log.recipe.get("generation") or {}).get("engine")
    facts["engine of the answers"] = engine
    facts["answer server"] = answers.server
    facts["model of the answer server"] = answers.served_model
    kind = ENGINES.get(str(engine))
    # a server does not say its precision; earlier logs have the recipe's in its place
    if precision and not (kind and kind.is_server):
        facts["precision of the answers"] = answers.dtype
        facts["quantized"] = answers.quantized
    if judge:
        facts["engine of the judge"] = judge.engine
        facts["address of the judge"] = judge.address
        facts["judge server"] = judge.server
        facts["thresholds of the judge"] = lowered_thresholds(log) or None
    facts["code"] = code_text(log.git) or None
    return {name: value for name, value in facts.items() if value is not None}


def lowered_thresholds(log: EvalLog) -> str:
    """Return which thresholds of a judge's audit ask less than the shipped ones, or nothing."""
    shipped = Thresholds()
    phrases = []
    for name, value in (log.recipe.get("thresholds") or {}).items():
        usual = getattr(shipped, name, None)
        if usual is None or value is None:
            continue
        is_lower = value > usual if name.endswith("_max") else value < usual
        if is_lower:
            phrases.append(f"{name} {value:g} (shipped: {usual:g})")
    return ", ".join(phrases)


def differing_prompts(first: EvalLog, second: EvalLog) -> str:
    """Return for how many common questions of two evaluations the recorded prompts differ, or
    nothing.
    """
    prompts = _prompts(first)
    others = _prompts(second)
    common = prompts.keys() & others.keys()
    differing = [key for key in common if prompts[key] != others[key]]
    if not differing:
        return ""
    task, id = min(differing)
    example = f"{task} {id.partition(':')[0]}"
    return f"the prompts of {len(differing)} of {len(common)} questions differ, such as {example}"


def _prompts(log: EvalLog) -> dict[tuple[str, str], str]:
    """Return the hashes of the prompts by task and question."""
    return {
        (metric.task, sample.id): sample.prompt
        for metric in log.metrics
        for sample in metric.samples
        if sample.prompt
    }
