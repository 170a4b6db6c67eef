"""Which questions were asked: some of them, one several times, and what nobody recorded of it."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.checks.asking import computing_facts, settings_of
from recipes_lib.analysis.findings import REPEATED_QUESTIONS, Finding, metric_names
from recipes_lib.analysis.readers.alpaca_eval import ANNOTATOR
from recipes_lib.analysis.runs import Arms, question_of
from recipes_lib.analysis.text import sentence_list
from recipes_lib.evals.log import NOT_RECORDED, EvalLog

FEWEST_OF_SUBSET = 30  # a smaller part of the questions is soon found that says anything
ALIKE = 0.1  # of the questions: below it, chance makes texts alike
# What the files of another program should say of asking and computing.
_RECORDS = (
    *("chat template", "system instruction", "few-shot", "gen_kwargs", "task version"),
    *("tokenizer", "backend", "precision of the answers"),
)


def check_subsets(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield evaluations that asked only some of their questions."""
    logs: dict[str, list[tuple[str, EvalLog]]] = defaultdict(list)
    for arm, log in arms.logs:
        logs[log.eval].append((arm, log))
    for name, of_eval in logs.items():
        lines = [f"{arm}: {log.subset}" for arm, log in of_eval if log.subset]
        if not lines:
            continue
        evidence = tuple(dict.fromkeys(lines))
        metrics = metric_names(log for _, log in of_eval)
        finding = partial(Finding, evidence=evidence, metrics=metrics)
        if any((log.recipe.get("suite") or {}).get("samples") for _, log in of_eval):
            title = f"The questions of {name} were chosen"
            remedy = "ask all of them: who can choose the questions can choose the answer"
            yield finding("chosen-questions", "error", title, remedy=remedy)
            continue
        title = f"{name} asked only some of its questions"
        remedy = "ask all of them"
        yield finding("subset", "warning", title, remedy=remedy)
        for (arm, log), (other_arm, other) in itertools.combinations(of_eval, 2):
            why = _why_no_subset(log, other)
            if arm != other_arm and why and log.source and other.source:
                pair = (arm, other_arm)
                title = f"{arm} and {other_arm} {why} in {name}"
                metrics = metric_names((log, other))
                yield Finding("other-subset", "error", title, evidence, remedy, pair, metrics)


def _why_no_subset(log: EvalLog, other: EvalLog) -> str:
    """Why two results say nothing about all questions, or nothing."""
    if log.subset is None and other.subset is None:
        return ""
    if log.subset != other.subset:
        return "were asked different parts of the questions"
    common = {metric.key for metric in log.metrics} & {metric.key for metric in other.metrics}
    counts = [len(metric.samples) for metric in log.metrics if metric.key in common]
    if min(filter(None, counts), default=0) < FEWEST_OF_SUBSET:
        return f"were asked fewer than {FEWEST_OF_SUBSET} of the questions"
    return ""


def check_repeats(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield metrics of other programs that may count one question several times."""
    unknown: dict[str, list[str]] = defaultdict(list)
    logs = [log for _, log in arms.logs if log.source]
    for log in logs:
        names: dict[str, list[str]] = defaultdict(list)  # of metrics, by what is found
        for metric in log.metrics:
            where = metric.task or log.eval
            questions = question_of(metric.samples)
            if metric.samples and not questions:
                unknown[where].append(metric.name)
            texts = {questions[each.id]: each.input for each in metric.samples if each.input}
            alike = {re.sub(r"\d+", "0", text) for text in texts.values()}
            repeated = len(texts) - len(alike)
            if repeated > ALIKE * len(texts):
                of_all = f"{repeated} of {len(texts)} questions of {where}"
                names[f"{of_all} differ from another in digits only"].append(metric.name)
        remedy = "if they are one question asked again, p is too small"
        for title, metrics in names.items():
            yield Finding(
                code=REPEATED_QUESTIONS,
                severity="warning",
                title=title,
                remedy=remedy,
                metrics=tuple(metrics),
            )
    for where, metrics in unknown.items():
        title = f"The texts of the questions of {where} are not recorded"
        remedy = "a question that was asked again under another id counts as another one"
        touched = tuple(dict.fromkeys(metrics))
        yield Finding("no-texts", "warning", title, remedy=remedy, metrics=touched)


def check_records(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield what the files of other programs do not say about asking and computing."""
    missing: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for arm, log in arms.logs:
        if log.source:
            facts = settings_of(log) | computing_facts(log)
            absent = [key for key, value in facts.items() if value == NOT_RECORDED]
            # of a task's fact the name stands behind the task
            recorded = {key.rpartition(": ")[2] for key in facts if key not in absent}
            records = (*_RECORDS, ANNOTATOR) if log.judge else _RECORDS
            absent = [name for name in records if name not in recorded] + absent
            if absent:
                missing[log.eval, tuple(dict.fromkeys(absent))].append(arm)
    for (name, facts_names), names in missing.items():
        of_whom = sentence_list([*dict.fromkeys(names)])
        title = f"Not recorded of {of_whom} in {name}: {sentence_list([*facts_names], 8)}"
        yield Finding("not-recorded", "warning", title, remedy="it may differ between the arms")
