"""What is wrong with the answers themselves: the same text again and again, nothing, or cut."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.findings import Finding
from recipes_lib.analysis.printed_commands import evaluate_again
from recipes_lib.analysis.runs import Arms, run_place
from recipes_lib.evals.faults import CUT, FORM_ONLY
from recipes_lib.evals.log import EvalLog, items_file

DEGENERATE = 0.2  # of all answers
SOME_DEGENERATE = 0.1
DEGENERATE_ANSWERS = "degenerate-answers"  # stands in the sentences that it touches


def check_answers(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms with many answers that are the same text, empty, cut or repetitive, and rules
    that see the form of an answer alone.
    """
    worst: dict[tuple[str, str, str], float] = {}  # share of bad answers in a training of an arm
    findings: dict[tuple[str, str, str], Finding] = {}
    for arm, log in arms.logs:
        for fault, (times, n) in log.faults.items():
            key = (arm, log.eval, fault)
            if times <= 2 or times / n <= max(SOME_DEGENERATE, worst.get(key, 0.0)):
                continue
            worst[key] = times / n
            # A cut answer that fails a rule might fail without the limit too: `_cut_by_rule`.
            is_by_rule = log.suite == "checks" and fault == CUT
            is_error = times / n > DEGENERATE and not is_by_rule
            remedy = f"read some of them: {run_place(items_file(log.file))}"
            if fault == CUT:
                remedy = _longer_answers(log, design)
            findings[key] = Finding(
                code=DEGENERATE_ANSWERS,
                severity="error" if is_error else "warning",
                title=f"{times} of {n} {arm} answers in {log.eval} {fault}",
                evidence=(run_place(log.file),),
                remedy=remedy,
                arms=(arm,),
                metrics=log.metric_names,
            )
    yield from findings.values()
    yield from _cut_by_rule(arms, design)
    form_only = {log.eval: log for _, log in arms.logs if FORM_ONLY in log.notes}
    for name, log in form_only.items():
        rows = run_place(items_file(log.file))
        yield Finding(
            code="form-only",
            severity="note",
            title=f"{name}: {FORM_ONLY}",
            remedy=f"whether they are right was not asked; read some answers: {rows}",
            metrics=log.metric_names,
        )


def _longer_answers(log: EvalLog, design: Design | None) -> str:
    limit = (log.recipe.get("generation") or {}).get("max_new_tokens")
    if not limit:
        return "evaluate with a higher generation.max_new_tokens"
    return evaluate_again(log, design, f"generation.max_new_tokens={2 * limit}")


@dataclass
class _RuleCounts:
    """How many of an arm's answers passed rules, over its trainings."""

    log: EvalLog  # of one training
    passed: int = 0
    cut: int = 0  # and failed: longer, each might have passed
    answers: int = 0

    def share(self, times: int) -> float:
        """Return a number of answers as a share of all."""
        return times / max(self.answers, 1)


def _cut_by_rule(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Pairs of arms where the token limit may have decided: the worse arm would have passed as
    often as the better one if its cut answers, which fail, had passed.
    """
    by_eval: dict[str, dict[str, _RuleCounts]] = defaultdict(dict)
    for arm, log in arms.logs:
        if log.suite == "checks":
            counts = by_eval[log.eval].setdefault(arm, _RuleCounts(log))
            for metric in log.metrics:
                counts.passed += sum(sample.value == 1 for sample in metric.samples)
                counts.cut += sum(sample.cut and not sample.value for sample in metric.samples)
                counts.answers += len(metric.samples)
    for name, by_arm in by_eval.items():
        passed = {arm: counts.share(counts.passed) for arm, counts in by_arm.items()}
        for pair in itertools.combinations(by_arm, 2):
            worse, better = sorted(pair, key=passed.__getitem__)
            counts = by_arm[worse]
            is_some = counts.cut > 2 and counts.share(counts.cut) > SOME_DEGENERATE
            if is_some and counts.share(counts.passed + counts.cut) >= passed[better]:
                yield Finding(
                    code=DEGENERATE_ANSWERS,
                    severity="error",
                    title=f"{counts.cut} of {counts.answers} {worse} answers in {name} hit the"
                    f" token limit and fail: longer, {worse} might pass as often as {better}",
                    evidence=(run_place(counts.log.file),),
                    remedy=_longer_answers(counts.log, design),
                    arms=(worse, better),
                    metrics=counts.log.metric_names,
                )
