"""Reasons not to believe a comparison, each a `Finding`; `find` lists all checks."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.answer_checks import check_answers
from recipes_lib.analysis.differences import arm_differences, base_weights
from recipes_lib.analysis.eval_facts import computing_facts, differing_prompts, lowered_thresholds
from recipes_lib.analysis.findings import SEVERITIES, Finding, Severity
from recipes_lib.analysis.missing import check_presence, check_subsets
from recipes_lib.analysis.printed_commands import audit_again, evaluate_again
from recipes_lib.analysis.runs import ArmRuns, Arms, Run, run_place
from recipes_lib.analysis.text import sentence_list, setting_text
from recipes_lib.core.files import model_fingerprint, read_object
from recipes_lib.evals.audit import HUMAN, PROBES
from recipes_lib.evals.leaks import is_searched
from recipes_lib.evals.log import EvalLog
from recipes_lib.training.resume_guard import flatten

# What only an audit asks; the rest is measured from the judgments.
ASKED_IN_AUDIT = {*PROBES.values(), HUMAN}
# These stand in the sentences that they touch.
UNAUDITED = "judge-not-audited"
EVALUATED_DIFFERENTLY = "evaluated-differently"
MANY_ARMS = 5
_ONE_MODEL = (
    "are one run",
    "have the same final weights, byte for byte",
    "were answered for by the same weights",
)
_PROMPT = ("data.prompt_format", "data")
_PRECISION = ("quantization", "quantization.load_in_4bit", "model.dtype")
_ONE_FORMAT = (
    "train both in one prompt format, or declare the difference in a study:"
    " factors: {format: [data.prompt_format]}"
)
# Parts of an eval recipe that say how fast or where it runs; the judge has its own check, and which
# engine answered is compared by `_facts`.
_FREE = re.compile(
    r"name|kind|judge\..*|thresholds\..*|metrics\..*|suite\.batch_size|generation\.(engine"
    r"|base_url|api_key_variable|concurrency|timeout_s|max_retries)"
)
_Logged = tuple[str, Run, EvalLog]  # the arm first


def find(arms: Arms, design: Design | None = None) -> list[Finding]:
    """Return what every check found, the heaviest first."""
    findings = [
        *check_copies(arms),
        *check_former_opponents(arms, design),
        *check_judges(arms, design),
        *check_answers(arms, design),
        *check_protocol(arms, design),
        *check_subsets(arms),
        *check_differences(arms, design),
        *check_base(arms),
        *check_leaks(arms),
        *check_selection(arms, design),
        *check_presence(arms),
    ]
    return sorted(
        dict.fromkeys(findings),
        key=lambda each: (SEVERITIES.index(each.severity), each.code, each.arms, each.title),
    )


def _metrics(logs: Iterable[EvalLog]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(metric.name for log in logs for metric in log.metrics))


def _by_eval(arms: Arms) -> dict[str, list[_Logged]]:
    logs: dict[str, list[_Logged]] = defaultdict(list)
    for arm in arms:
        for run in arm.runs:
            for log in run.evals:
                logs[log.eval].append((arm.name, run, log))
    return logs


# ---- One model under two names ----


def check_copies(arms: Arms) -> Iterator[Finding]:
    """Yield arms that share a run, final weights or all answers, and seeds of equal weights."""
    # arm -> title and what is identical -> run -> place
    seen: dict[str, dict[tuple[str, str], dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, title, known, run, place in _identities(arms):
        seen[name][title, known][run] = place
    for first, second in itertools.combinations(arms, 2):
        both = (first.name, second.name)
        shared = [key for key in seen[first.name] if key in seen[second.name]]
        if shared:
            title = min((key[0] for key in shared), key=_ONE_MODEL.index)
            places = [seen[name][key].values() for key in shared for name in both]
            lines = tuple(dict.fromkeys(itertools.chain(*places)))
            remedy = "find out which arm it belongs to, and redo the other's"
            title = f"{' and '.join(both)} {title}"
            yield Finding("same-model", "error", title, lines, remedy, both)
        else:
            yield from _same_answers(first, second)
    for name, identities in seen.items():
        for runs in identities.values():
            if len(runs) > 1 and not arms[name].is_base:
                title = f"{len(runs)} trainings of {name} ended with the same weights"
                remedy = "one training must not count twice: did the seed reach the training?"
                yield Finding("same-seeds", "error", title, (*sorted(runs),), remedy, (name,))


def _identities(arms: Arms) -> Iterator[tuple[str, str, str, str, str]]:
    """What each run is, its weights and what answered: arm, title, identity, run and place."""
    folders: dict[int, list[tuple[str, str, Path]]] = defaultdict(list)  # of weights, by size
    for arm in arms:
        for run in arm.runs:
            if not run.foreign:  # two models of another program may share a name
                yield arm.name, _ONE_MODEL[0], run.name, run.name, f"runs/{run.name}"
            for log in run.evals:
                if known := log.answers.fingerprint:
                    yield arm.name, _ONE_MODEL[2], known, run.name, run_place(log.file)
            for folder in (run.folder / "adapter", run.folder / "model"):
                size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                folders[size].append((arm.name, run.name, folder))
    for size, of_size in folders.items():
        for name, run_name, folder in of_size if size and len(of_size) > 1 else ():
            yield name, _ONE_MODEL[1], model_fingerprint(folder), run_name, run_place(folder)


def _same_answers(first: ArmRuns, second: ArmRuns) -> Iterator[Finding]:
    """Answers of one evaluation that are all the same in both arms."""
    logs = {(log.eval, log.against): log for log in second.logs}
    for log in {log.eval: log for log in first.logs if (log.eval, log.against) in logs}.values():
        other = logs[log.eval, log.against]
        texts, other_texts = _answers(log), _answers(other)
        common = texts.keys() & other_texts.keys()
        if len(common) > 1 and all(texts[key] == other_texts[key] for key in common):
            title = f"All answers of {first.name} and {second.name} in {log.eval} are the same"
            places = (run_place(log.file), run_place(other.file))
            remedy = "equal models give equal answers; else one set is a copy: redo it"
            pair, metrics = (first.name, second.name), _metrics((log, other))
            yield Finding("same-answers", "error", title, places, remedy, pair, metrics)


def _answers(log: EvalLog) -> Mapping[Any, Sequence[str]]:
    samples = (sample for metric in log.metrics for sample in metric.samples)
    return {sample.key: sample.answer.split() for sample in samples if sample.answer is not None}


def check_former_opponents(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield verdicts against answers of a run that has other weights now."""
    runs = {run.name: (rival.name, run) for rival in arms for run in rival.runs}
    for arm, log in arms.logs:
        rival, run = runs.get(log.against or "", ("", None))
        if run is None or log.opponent is None:
            continue
        judged = log.opponent.fingerprint
        now = {each.answers.fingerprint for each in run.evals if each.eval == log.eval} - {""}
        if judged and now and judged not in now:
            title = f"{arm} was judged in {log.eval} against outdated answers of {run.name}"
            lines = (f"{run_place(log.file)}: weights {judged[:12]}", f"now {min(now)[:12]}")
            remedy = evaluate_again(log, design)
            both, metrics = (arm, rival), tuple(m.name for m in log.metrics if m.opponent)
            yield Finding("former-opponent", "error", title, lines, remedy, both, metrics, rival)


# ---- The judge ----


def check_judges(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield judges that differ, are weak, not audited or their own, and verdicts of one order."""
    failed, audited = _audits(arms)
    for name, every in _by_eval(arms).items():
        logs = [logged for logged in every if logged[2].suite != "lm_eval"]
        judges = {log.judge.fingerprint: log.judge for _, _, log in logs if log.judge}
        if not judges:
            continue
        metrics = _metrics(log for _, _, log in logs)
        yield from _different_judges(name, logs, metrics)
        if kin := {arm: each for arm, run, log in logs if (each := _kinship(log, run))}:
            who = sentence_list([f"{arm} was judged by {each}" for arm, each in kin.items()])
            title, remedy = f"{who} in {name}", "use an unrelated judge"
            yield Finding("self-judged", "error", title, (), remedy, (*kin,), metrics, of_any=True)
        for arm, _, log in logs:
            single = {
                metric.name: None
                for metric in log.metrics
                if log.judge and metric.opponent is not None
                for sample in metric.samples
                if len(sample.verdicts) == 1 and not sample.by_rule
            }
            if single:  # a judge's preference for a position is part of the rate
                title = f"Comparisons of {arm} in {name} were judged in one order only"
                remedy, place = "judge both orders", (run_place(log.file),)
                yield Finding("one-order", "error", title, place, remedy, (arm,), (*single,))
        if lines := tuple(dict.fromkeys(line for key in judges for line in failed.get(key, ()))):
            title = f"The judge of {name} failed its audit: {lines[0].partition(': ')[2]}"
            remedy = "use a stronger judge, such as those in evals/judges"
            yield Finding("judge-failed-audit", "error", title, lines, remedy, (), metrics)
        if not judges.keys() <= audited:
            title = f"The judge of {name} was not audited"
            judged = [log for _, _, log in logs if log.judge]
            remedy = audit_again(judged[0], design)
            yield Finding(UNAUDITED, "warning", title, (), remedy, (), metrics)
        lowered = dict.fromkeys(filter(None, (lowered_thresholds(log) for _, _, log in logs)))
        if lowered:
            yield Finding(
                code="lowered-thresholds",
                severity="warning",
                title=f"The judge of {name} had to reach less than the shipped thresholds",
                evidence=tuple(lowered),
                remedy="use the shipped thresholds, or a stronger judge",
                metrics=metrics,
            )
        if weak := tuple(dict.fromkeys(judge.weak for judge in judges.values() if judge.weak)):
            title = f"The judge of {name} is weak"
            yield Finding("weak-judge", "warning", title, weak, "use a stronger judge", (), metrics)


def _audits(arms: Arms) -> tuple[dict[str, list[str]], set[str]]:
    """The failed checks by judge, and the judges audited in an eval or beside the runs."""
    failed: dict[str, list[str]] = defaultdict(list)
    audited: set[str] = set()
    for name, log in arms.logs:
        if log.judge and log.audit:
            if not {check.check for check in log.audit.not_measured} >= ASKED_IN_AUDIT:
                audited.add(log.judge.fingerprint)
            for check in log.audit.failed:
                value = "n/a" if check.value is None else f"{check.value:.3f}"
                line = f"{name}, {log.eval}: {check.check} {value}, needs {check.needs}"
                failed[log.judge.fingerprint].append(line)
    for root in {run.folder.parent for arm in arms for run in arm.runs}:
        for file in sorted(root.glob("judge--*/*/judge_audit.json")):
            card = read_object(file)
            audited.add(str(card.get("judge")))
            for check in card.get("checks") or ():
                if check.get("result") == "fail":
                    line = f"{check['check']} {check.get('value')}, needs {check.get('needs')}"
                    failed[str(card.get("judge"))].append(f"{file.parent.name}: {line}")
    return failed, audited


def _different_judges(
    name: str, logs: Sequence[_Logged], metrics: tuple[str, ...]
) -> Iterator[Finding]:
    """Every two arms of other judges; a judge that is not recorded may be any."""
    judges: dict[str, set[str]] = defaultdict(set)
    for arm, _, log in logs:
        judge = log.judge
        known = f"{judge.name} {judge.fingerprint[:12]}".strip() if judge else "not recorded"
        judges[arm].add(known)
    for pair in itertools.combinations(judges, 2):
        if len(judges[pair[0]] | judges[pair[1]]) > 1:
            title = f"Different judges judged {pair[0]} and {pair[1]} in {name}"
            lines = tuple(f"{arm}: {', '.join(sorted(judges[arm]))}" for arm in pair)
            remedy = "evaluate all arms with one judge"
            yield Finding("judges-differ", "error", title, lines, remedy, pair, metrics)


def _kinship(log: EvalLog, run: Run) -> str:
    """What the judge is to the run whose answers it judged; empty where they are strangers."""
    judge = log.judge
    if judge is None or not judge.model:
        return ""
    model, home = judge.model.rstrip("/"), run.folder.resolve()
    is_here = judge.weights or (Path(model).is_dir() and not run.foreign)  # else a name elsewhere
    if is_here and Path(model).resolve().is_relative_to(home):
        return "its own weights"
    if run.name == model:
        return "itself"
    names = ((run.resolved.get("model") or {}).get("name_or_path"), *log.answers.models)
    if model.lower() in {str(name).rstrip("/").lower() for name in names if name}:
        return "itself" if run.is_base else "its base"
    for folder in (run.folder / "merged", run.folder / "model") if judge.weights else ():
        if folder.is_dir() and model_fingerprint(folder) == judge.weights:
            return "its own weights"
    if judge.weights and base_weights(run) == judge.weights[:12]:  # a copy in another folder
        return "itself" if run.is_base else "its base"
    return ""


# ---- What was asked, and how ----


def check_protocol(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield what differs between the evaluations of two arms."""
    design = design or Design("", "")
    for arm, log in () if design.declares(*_PROMPT) else arms.logs:
        both = (arm, arms.opponent(log.against) or "")
        formats = {facts.prompt_format_hash for facts in (log.answers, log.opponent) if facts}
        if both[1] in arms.by_name and len(formats - {None, ""}) > 1:
            title = f"{arm} and {both[1]} were asked in different prompt formats in {log.eval}"
            place, metrics = (run_place(log.file),), _metrics((log,))
            yield Finding("protocol-differs", "error", title, place, _ONE_FORMAT, both, metrics)
    for logs in _by_eval(arms).values():
        metrics = _metrics(log for _, _, log in logs)
        for (arm, _, left), (other, _, right) in itertools.combinations(logs, 2):
            rivals = {arms.opponent(left.against) or "", arms.opponent(right.against) or ""}
            if not _metric_keys(left) & _metric_keys(right):
                continue  # two commands about other tasks: nothing of them is compared
            direct = rivals & {arm, other}  # then their row is named after the base, or the earlier
            if arm != other and (direct or len(rivals) == 1 or _grades(left) & _grades(right)):
                second = other if arms[other].is_base else arm
                opponent = second if direct else rivals.pop() if len(rivals) == 1 else ""
                scope = (arm, other), metrics, opponent
                yield from _asked_differently(left, right, design, scope)


def _metric_keys(log: EvalLog) -> set[tuple[str, str, str]]:
    return {metric.key for metric in log.metrics}


def _grades(log: EvalLog) -> set[tuple[str, str, str]]:
    """What is measured without an opponent, and compared whichever opponent stands beside it."""
    return {metric.key for metric in log.metrics if metric.opponent is None}


def _asked_differently(
    first: EvalLog,
    second: EvalLog,
    design: Design,
    scope: tuple[tuple[str, str], tuple[str, ...], str],
) -> Iterator[Finding]:
    """Settings and texts of two evaluations, and the precision, versions and code that answered."""
    both, pair = " and ".join(scope[0]), scope[0]
    foreign = bool(first.source or second.source)
    of_prompt, of_precision = (not design.declares(*keys) for keys in (_PROMPT, _PRECISION))
    lines = _unequal(pair, [_settings(log, of_prompt) for log in (first, second)], foreign)
    if lines:
        title = f"{both} were asked differently in {first.eval}: {sentence_list([*lines], 3)}"
        remedy = _ONE_FORMAT if "prompt format" in lines else "evaluate both with one eval recipe"
        yield Finding("protocol-differs", "error", title, (*lines.values(),), remedy, *scope)
    texts = _other_texts(first, second)
    if texts:
        title = f"{both} were asked different texts under the same ids in {first.eval}"
        remedy = "evaluate both with the same questions and reference answers"
        yield Finding("texts-differ", "error", title, texts, remedy, *scope)
    lines = _unequal(pair, [computing_facts(log, of_precision) for log in (first, second)], foreign)
    prompts = differing_prompts(first, second)
    if prompts:
        lines["prompts"] = prompts
    if lines:
        what = f"were evaluated with different {sentence_list([*lines], 3)} in {first.eval}"
        about = f"{both} {what}", (*lines.values(),), "evaluate both in the same way"
        yield Finding(EVALUATED_DIFFERENTLY, "confound", *about, *scope)


def _unequal(
    pair: tuple[str, str], values: Sequence[Mapping[str, Any]], foreign: bool
) -> dict[str, str]:
    """What differs, a line for each; the files of another program do not say everything."""
    first, second = values
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if foreign:
        keys = [key for key in keys if key in first and key in second]
    texts = {key: [setting_text(known.get(key)) for known in values] for key in keys}
    return {key: f"{key}: {pair[0]} {a}, {pair[1]} {b}" for key, (a, b) in texts.items()}


def _settings(log: EvalLog, of_prompt: bool) -> dict[str, Any]:
    """How an evaluation asked, by dotted key."""
    recipe = flatten(dict(log.recipe)).items()
    values = {key: value for key, value in recipe if not _FREE.fullmatch(key)}
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


def _other_texts(first: EvalLog, second: EvalLog) -> tuple[str, ...]:
    """Items of one id that were about another question, or another answer of one opponent."""
    samples, others = (
        {(metric.key, sample.key): sample for metric in log.metrics for sample in metric.samples}
        for log in (first, second)
    )
    differing: dict[str, set[str]] = defaultdict(set)
    for key in samples.keys() & others.keys():
        sample, other = samples[key], others[key]
        if _differ(sample.input, other.input):
            differing["the question"].add(sample.id)
        elif first.against == second.against and _differ(sample.opponent, other.opponent):
            differing[f"the answer of {first.against}"].add(sample.id)
    return tuple(
        f"{what} differs for {len(ids)} ids, such as {min(ids)}" for what, ids in differing.items()
    )


def _differ(text: str | None, other: str | None) -> bool:
    return text is not None and other is not None and text.strip() != other.strip()


# ---- Trainings ----


def check_differences(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield what differs between two trained arms and no factor declares."""
    for first, second in itertools.combinations(arms, 2):
        both = (first.name, second.name)
        differences = arm_differences(first, second, design)
        confounds = [each for each in differences if each.level == "confound"]
        unknown = [each.what for each in confounds if each.is_unknown]
        names = sentence_list([each.what for each in confounds if not each.is_unknown], 4)
        title = f"{both[0]} and {both[1]} differ in {names}"
        if unknown and names:
            title += f" (and have no record of their {sentence_list(unknown, 4)})"
        elif unknown:
            title = f"{both[0]} and {both[1]} have no record of their {sentence_list(unknown, 4)}"
        lines = tuple(each.text for each in confounds)
        if confounds and design is None:
            remedy = "a study declares what is meant to differ, so that a cause can be named"
            yield Finding("differences", "note", title, lines, remedy, both)
        elif confounds:
            title += ", which no factor declares"
            remedy = "give both the same values, or declare them under factors"
            yield Finding("undeclared-difference", "confound", title, lines, remedy, both)


def check_base(arms: Arms) -> Iterator[Finding]:
    """Yield arms that were trained on other weights than their base was evaluated with."""
    weights = {arm.name: {*map(base_weights, arm.runs)} - {""} for arm in arms}
    for base, arm in itertools.permutations(arms, 2):
        now, then = weights[base.name], weights[arm.name]
        if base.is_base and not arm.is_base and now and then and now != then:
            lines = (f"{base.name}: {min(now)}, {arm.name}: {min(then - now or then)}",)
            title = f"{arm.name} was trained on different weights than {base.name}"
            remedy = "evaluate its base"
            yield Finding("other-base", "error", title, lines, remedy, (arm.name, base.name))


def check_leaks(arms: Arms) -> Iterator[Finding]:
    """Yield arms that were trained on questions of an evaluation, or were not searched."""
    unknown: dict[str, list[str]] = defaultdict(list)
    for arm in arms:
        # runs of one arm saw the same rows, so the first result of each evaluation says it
        for log in {log.eval: log for log in reversed(arm.logs)}.values():
            if arm.is_base or not log.metrics or not is_searched(log.suite, _questions(log)):
                continue
            if log.leaks is None or log.leaks.why:
                unknown[log.eval].append(arm.name)
            elif log.leaks.found:
                severity: Severity = "error" if log.leaks.is_error else "warning"
                title = f"{arm.name}: {log.leaks.summary(log.eval)}"
                lines = (*log.leaks.lines(5), run_place(log.file))
                remedy = "train without these rows, or use other questions"
                scope = (arm.name,), _metrics(each for each in arm.logs if each.eval == log.eval)
                yield Finding("leaked-questions", severity, title, lines, remedy, *scope)
    for name, who in unknown.items():
        title = f"Rows of {sentence_list(who)} were not searched for questions of {name}"
        touched = tuple(who) if len(who) == 1 else ()
        yield Finding("leaks-not-searched", "warning", title, (), "", touched)


def check_selection(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield choices made on compared rows or at the edge of a grid, and many arms."""
    trained = [arm for arm in arms if not arm.is_base]
    tuned = design.tuned if design else {}
    if len(trained) >= MANY_ARMS:
        title = f"The best of {len(trained)} arms looks better than it is"
        remedy = "train the best one again with new seeds"
        yield Finding("best-of-many", "warning", title, (), remedy)
    on_validation = _metrics(log for _, log in arms.logs if _questions(log) == "validation")
    for arm in arms:
        grid = tuned.get(arm.name)
        if grid and grid.edge:
            title = f"{arm.name} is best at the {grid.edge} {grid.key} that was tried"
            line = f"{grid.key}: {grid.chosen} of {', '.join(map(str, grid.values))}"
            remedy = "the best may lie beyond it: extend the grid of every arm there"
            yield Finding("tuned-at-edge", "confound", title, (line,), remedy, (arm.name,))
        trains = [run.resolved.get("train") or {} for run in arm.runs]
        best = any(values.get("load_best_model_at_end") for values in trains)
        if (grid or best) and on_validation:
            title = f"The validation rows chose the weights of {arm.name}"
            remedy = "a loss on them is biased low: compare on data.questions: test"
            where = (arm.name,), on_validation
            yield Finding("chosen-on-validation", "warning", title, (), remedy, *where)
    yield from _different_seeds(trained, design)
    for both in itertools.combinations([arm.name for arm in trained], 2):
        grids = {(grid.key, grid.values) if (grid := tuned.get(arm)) else None for arm in both}
        if len(grids) > 1:
            title = f"{both[0]} and {both[1]} were not tuned over the same values"
            remedy = "set tune for the study, not for an arm"
            yield Finding("tuned-differently", "confound", title, (), remedy, both)


def _different_seeds(trained: Sequence[ArmRuns], design: Design | None) -> Iterator[Finding]:
    """Arms of other training seeds: who could choose the seeds of one arm could choose the best."""
    for first, second in itertools.combinations(trained, 2):
        seeds = {run.seed for run in first.runs if run.seed is not None}
        other_seeds = {run.seed for run in second.runs if run.seed is not None}
        if seeds and other_seeds and seeds != other_seeds:
            yield Finding(
                code="different-seeds",
                severity="confound" if design else "note",
                title=f"{first.name} and {second.name} were trained with different seeds",
                evidence=(
                    f"{first.name}: {sentence_list([*map(str, sorted(seeds))])}",
                    f"{second.name}: {sentence_list([*map(str, sorted(other_seeds))])}",
                ),
                remedy="give both the same seeds",
                arms=(first.name, second.name),
            )


def _questions(log: EvalLog) -> Any:
    return (log.recipe.get("data") or {}).get("questions")
