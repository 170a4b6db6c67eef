"""What was asked, and how: settings, texts, prompt formats, and what computed the answers."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.checks.judges import lowered_thresholds
from recipes_lib.analysis.differences import code_text
from recipes_lib.analysis.findings import EVALUATED_DIFFERENTLY, Finding, metric_names
from recipes_lib.analysis.runs import Arms, run_place
from recipes_lib.analysis.text import sentence_list, setting_text
from recipes_lib.evals.engines import ENGINES
from recipes_lib.evals.log import EvalLog
from recipes_lib.training.resume_guard import flatten

_PROMPT = ("data.prompt_format", "data")
_PRECISION = ("quantization", "quantization.load_in_4bit", "model.dtype")
_ONE_FORMAT = (
    "train both in one prompt format, or declare the difference in a study:"
    " factors: {format: [data.prompt_format]}"
)
# Parts of an eval recipe that say how fast or where it runs; the judge has its own check, and which
# engine answered is among the facts of `computing_facts`.
_FREE = re.compile(
    r"name|title|kind|judge\..*|thresholds\..*|metrics\..*|suite\.batch_size|generation\.(engine"
    r"|base_url|api_key_variable|concurrency|timeout_s|max_retries)"
)

# What a prompt has in it: where all common prompts are known and equal, these differ in vain.
_IN_PROMPTS = ("chat template", "system instruction", "few-shot seed")

_Facts = Mapping[str, Any]
_Texts = Mapping[Any, int]  # hashes, by item; an item without a text has none


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """A result and what is compared of it, read once: it stands in a pair with every other."""

    arm: str
    log: EvalLog
    opponent: str  # its arm, or what it is called; empty where there is none
    metrics: Set[tuple[str, str, str]]
    grades: Set[tuple[str, str, str]]  # those that are measured without an opponent
    settings: _Facts
    facts: _Facts
    questions: _Texts
    opponent_answers: _Texts
    prompts: _Texts


def check_asking(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield what differs between two arms in one evaluation: settings, texts, computing."""
    design = design or Design("", "")
    by_eval: dict[str, list[_Evaluation]] = defaultdict(list)
    for arm, log in arms.logs:
        evaluation = _evaluation(arms, arm, log, design)
        by_eval[log.eval].append(evaluation)
        sides = [facts for facts in (log.answers, log.opponent) if facts]
        formats = {facts.prompt_format_hash for facts in sides if facts.prompt_format_hash}
        rival = evaluation.opponent
        if len(formats) > 1 and rival in arms.by_name and not design.declares(*_PROMPT):
            yield Finding(
                code="protocol-differs",
                severity="error",
                title=f"{arm} and {rival} were asked in different prompt formats in {log.eval}",
                evidence=(run_place(log.file),),
                remedy=_ONE_FORMAT,
                arms=(arm, rival),
                metrics=log.metric_names,
            )
    for evaluations in by_eval.values():
        metrics = metric_names(evaluation.log for evaluation in evaluations)
        for first, second in itertools.combinations(evaluations, 2):
            # two commands about other tasks: nothing of them is compared
            if first.arm == second.arm or not first.metrics & second.metrics:
                continue
            opponents = {first.opponent, second.opponent}
            opponent = ""
            if opponents & {first.arm, second.arm}:
                # head to head their row is named after the base, or the earlier arm
                opponent = second.arm if arms[second.arm].is_base else first.arm
            elif len(opponents) == 1:
                opponent = first.opponent
            elif not first.grades & second.grades:
                continue
            yield from _differences(first, second, metrics, opponent)


def _evaluation(arms: Arms, arm: str, log: EvalLog, design: Design) -> _Evaluation:
    questions = {}
    opponent_answers = {}
    prompts = {}
    for metric in log.metrics:
        for sample in metric.samples:
            if sample.input is not None:
                questions[metric.key, sample.key] = hash(sample.input.strip())
            if sample.opponent is not None:
                opponent_answers[metric.key, sample.key] = hash(sample.opponent.strip())
            if sample.prompt:
                prompts[metric.task, sample.id] = hash(sample.prompt)
    return _Evaluation(
        arm=arm,
        log=log,
        opponent=arms.opponent(log.against) or "",
        metrics={metric.key for metric in log.metrics},
        grades={metric.key for metric in log.metrics if metric.opponent is None},
        settings=settings_of(log, of_prompt=not design.declares(*_PROMPT)),
        facts=computing_facts(log, of_precision=not design.declares(*_PRECISION)),
        questions=questions,
        opponent_answers=opponent_answers,
        prompts=prompts,
    )


def settings_of(log: EvalLog, of_prompt: bool = True) -> dict[str, Any]:
    """Return how an evaluation asked, by dotted key."""
    recipe = flatten(dict(log.recipe))
    values = {key: value for key, value in recipe.items() if not _FREE.fullmatch(key)}
    for metric in log.metrics:
        if metric.num_fewshot is not None:
            values.pop("suite.num_fewshot", None)  # asked for, or the task's own: it is known
            values[f"{metric.task}: few-shot"] = metric.num_fewshot
        if metric.version is not None:
            values[f"{metric.task}: task version"] = metric.version
    for key, value in (log.answers.decoding or {}).items():
        values[f"decoding.{key}"] = value
    if of_prompt and log.answers.prompt_format_hash:
        values["prompt format"] = log.answers.prompt_format_hash[:12]
    if log.settings:  # of files: rules, rubrics and prompts among them
        values["files or code of the eval"] = log.settings.rpartition("-")[2][:12]
    return values


def computing_facts(log: EvalLog, of_precision: bool = True) -> dict[str, Any]:
    """Return what computed the answers and the verdicts; what is not known is absent."""
    facts: dict[str, Any] = dict(log.libraries)
    if log.suite != "lm_eval":
        facts.pop("lm_eval", None)  # it is installed, and measured nothing here
    engine = log.answers.engine or (log.recipe.get("generation") or {}).get("engine")
    facts["engine of the answers"] = engine
    facts["answer server"] = log.answers.server
    facts["model of the answer server"] = log.answers.served_model
    kind = ENGINES.get(str(engine))
    # a server does not say its precision; earlier logs have the recipe's in its place
    if of_precision and not (kind and kind.is_server):
        facts["precision of the answers"] = log.answers.dtype
        facts["quantized"] = log.answers.quantized
    if log.judge:
        facts["engine of the judge"] = log.judge.engine
        facts["address of the judge"] = log.judge.address
        facts["judge server"] = log.judge.server
        facts["thresholds of the judge"] = lowered_thresholds(log) or None
    facts["code"] = code_text(log.git) or None
    return {name: value for name, value in facts.items() if value is not None}


def _differences(
    first: _Evaluation, second: _Evaluation, metrics: tuple[str, ...], opponent: str
) -> Iterator[Finding]:
    """What differs between two evaluations, of the rows of these metrics and this opponent."""
    both = f"{first.arm} and {second.arm}"
    where = first.log.eval
    finding = partial(Finding, arms=(first.arm, second.arm), metrics=metrics, opponent=opponent)
    for task, lines in _asked_by_task(first, second).items():
        title = f"{both} were asked differently in {where}: {sentence_list([*lines], 3)}"
        evidence = tuple(lines.values())
        remedy = _ONE_FORMAT if "prompt format" in lines else "ask both in the same way"
        about = finding("protocol-differs", "error", title, evidence=evidence, remedy=remedy)
        both_metrics = (*first.log.metrics, *second.log.metrics)
        of_task = [each.name for each in both_metrics if task in (each.task, *each.parts)]
        yield replace(about, metrics=tuple(dict.fromkeys(of_task))) if task else about
    other_questions = set()
    for item in _differing(first.questions, second.questions):
        (_, task, _), (id, _) = item
        if (task, id) not in first.prompts or (task, id) not in second.prompts:
            other_questions.add(item)
    differing = {"the question": other_questions}
    if first.log.against == second.log.against:
        answers = _differing(first.opponent_answers, second.opponent_answers)
        differing[f"the answer of {first.log.against}"] = answers - other_questions
    other_texts = []
    for text, items in differing.items():
        ids = {sample_key[0] for _, sample_key in items}
        if ids:
            other_texts.append(f"{text} differs for {len(ids)} ids, such as {min(ids)}")
    if other_texts:
        title = f"{both} were asked different texts under the same ids in {where}"
        evidence = tuple(other_texts)
        remedy = "evaluate both with the same questions and reference answers"
        yield finding("texts-differ", "error", title, evidence=evidence, remedy=remedy)
    facts = _unequal(first, second, first.facts, second.facts)
    if facts:
        title = f"{both} were evaluated with different {sentence_list([*facts], 3)} in {where}"
        evidence = tuple(facts.values())
        remedy = "evaluate both in the same way"
        yield finding(EVALUATED_DIFFERENTLY, "confound", title, evidence=evidence, remedy=remedy)


def _asked_by_task(first: _Evaluation, second: _Evaluation) -> dict[str, dict[str, str]]:
    """A line for each difference of asking, by the task whose rows it touches; "" is all."""
    tasks = {metric.task for metric in (*first.log.metrics, *second.log.metrics)}
    has_common_prompts = not first.prompts.keys().isdisjoint(second.prompts)
    other_prompts: dict[str, list[str]] = defaultdict(list)
    for task, id in sorted(_differing(first.prompts, second.prompts)):
        other_prompts[task].append(id.partition(":")[0])
    lines: dict[str, dict[str, str]] = defaultdict(dict)
    for key, line in _unequal(first, second, first.settings, second.settings).items():
        task = key.partition(": ")[0]
        touched = [task if task in tasks else ""]
        if key in _IN_PROMPTS and has_common_prompts:
            touched = list(other_prompts)
        for task in touched:
            lines[task][key] = line
    for task, ids in other_prompts.items():
        common = [key for key in first.prompts if key[0] == task and key in second.prompts]
        count = f"{len(ids)} of {len(common)} questions of {task}"
        lines[task][f"{task}: prompts"] = f"the prompts of {count} differ, such as {ids[0]}"
    return lines


def _unequal(
    first: _Evaluation, second: _Evaluation, values: _Facts, other_values: _Facts
) -> dict[str, str]:
    """What differs, a line for each; the files of another program do not say everything."""
    is_foreign = bool(first.log.source or second.log.source)
    lines = {}
    for key in {**values, **other_values}:
        is_known = key in values and key in other_values
        value = values.get(key)
        other_value = other_values.get(key)
        if value != other_value and (is_known or not is_foreign):
            texts = f"{first.arm} {setting_text(value)}, {second.arm} {setting_text(other_value)}"
            lines[key] = f"{key}: {texts}"
    return lines


def _differing(texts: _Texts, others: _Texts) -> set[Any]:
    """The items that both have and whose texts differ."""
    if texts == others:  # as most are; the fastest way to see it
        return set()
    return {item for item in texts.keys() & others.keys() if texts[item] != others[item]}
