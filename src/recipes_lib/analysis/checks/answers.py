"""What is wrong with the answers themselves: the same text again and again, nothing, or cut."""

import itertools
from collections import defaultdict
from collections.abc import Iterator

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.findings import DEGENERATE_ANSWERS, Finding
from recipes_lib.analysis.printed_commands import evaluate_again
from recipes_lib.analysis.runs import Arms, run_place
from recipes_lib.evals.faults import CUT, FORM_ONLY
from recipes_lib.evals.log import EvalLog, Sample, items_file

DEGENERATE = 0.2  # of all answers
SOME_DEGENERATE = 0.1


def check_answers(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms with many answers of one fault, and rules that see an answer's form alone."""
    worst: dict[tuple[str, str, str], float] = {}  # share of bad answers in a training of an arm
    findings: dict[tuple[str, str, str], Finding] = {}
    for arm, log in arms.logs:
        for fault, (times, n) in log.faults.items():
            key = (arm, log.eval, fault)
            if times <= 2 or times / n <= max(SOME_DEGENERATE, worst.get(key, 0.0)):
                continue
            worst[key] = times / n
            # A cut answer that fails a rule might fail without the limit too: `check_cut_answers`.
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
    form_only = {log.eval: log for _, log in arms.logs if FORM_ONLY in log.notes}
    for name, log in form_only.items():
        rows = run_place(items_file(log.file))
        title = f"{name}: {FORM_ONLY}"
        remedy = f"whether they are right was not asked; read some answers: {rows}"
        yield Finding("form-only", "note", title, remedy=remedy, metrics=log.metric_names)


def _longer_answers(log: EvalLog, design: Design | None) -> str:
    limit = (log.recipe.get("generation") or {}).get("max_new_tokens")
    if not limit:
        return "evaluate with a higher generation.max_new_tokens"
    return evaluate_again(log, design, f"generation.max_new_tokens={2 * limit}")


def check_cut_answers(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield pairs of arms where the token limit may have decided: the worse arm would have passed
    as often as the better one if its cut answers, which fail, had passed.
    """
    logs: dict[str, dict[str, EvalLog]] = defaultdict(dict)  # the first of an arm, by eval
    samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)  # of all its trainings
    for arm, log in arms.logs:
        if log.suite == "checks":
            logs[log.eval].setdefault(arm, log)
            for metric in log.metrics:
                samples[log.eval, arm] += metric.samples
    for name, log_of_arm in logs.items():
        share = {}
        share_if_longer = {}
        cut = {}
        for arm in log_of_arm:
            answers = samples[name, arm]
            passed = sum(sample.value == 1 for sample in answers)
            cut[arm] = sum(sample.cut and not sample.value for sample in answers)
            share[arm] = passed / max(len(answers), 1)
            share_if_longer[arm] = (passed + cut[arm]) / max(len(answers), 1)
        for pair in itertools.combinations(log_of_arm, 2):
            worse, better = sorted(pair, key=share.__getitem__)
            n = len(samples[name, worse])
            is_some = cut[worse] > 2 and cut[worse] / n > SOME_DEGENERATE
            if is_some and share_if_longer[worse] >= share[better]:
                yield Finding(
                    code=DEGENERATE_ANSWERS,
                    severity="error",
                    title=f"{cut[worse]} of {n} {worse} answers in {name} hit the token limit and"
                    f" fail: longer, {worse} might pass as often as {better}",
                    evidence=(run_place(log_of_arm[worse].file),),
                    remedy=_longer_answers(log_of_arm[worse], design),
                    arms=(worse, better),
                    metrics=log_of_arm[worse].metric_names,
                )
