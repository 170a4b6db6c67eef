"""Reasons not to believe a comparison: one small function each, in `CHECKS`.

An `error` stops the sentences that it touches, never the table. A `confound` leaves a sentence and
takes its cause away. A `warning` stands beside it, a `note` informs.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.differences import arm_differences, base_weights
from recipes_lib.analysis.runs import ArmRuns, Arms, Run, run_place
from recipes_lib.analysis.table import TableRow
from recipes_lib.analysis.text import sentence_list, setting_text
from recipes_lib.core.files import folder_fingerprint, read_object
from recipes_lib.evals.audit import HUMAN, PROBES
from recipes_lib.evals.leaks import is_searched
from recipes_lib.evals.log import FEWEST_LETTERS, EvalLog, one_and_the_same
from recipes_lib.training.resume_guard import flatten

Severity = Literal["error", "confound", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "confound", "warning", "note")
DEGENERATE, SOME_DEGENERATE = 0.2, 0.1  # of all answers
LONGER = 1.5
CUT = "hit the token limit"
# What only an audit asks; the rest is measured from the judgments themselves.
ASKED_IN_AUDIT = {*PROBES.values(), HUMAN}
UNAUDITED = "judge-not-audited"  # stands in the sentences that it touches
MANY_ARMS = 5
# Parts of an eval recipe that say how fast or where it runs, not what is asked; the judge has a
# check of its own.
_FREE = re.compile(
    r"name|kind|judge\..*|thresholds\..*|metrics\..*|suite\.batch_size|generation\.(engine|batch_tokens"
    r"|base_url|served_name|api_key_variable|concurrency|timeout_s|max_retries|num_processes)"
)


@dataclass(frozen=True)
class Finding:
    """One thing found about a comparison.

    `title` says it in one sentence, `evidence` holds what was seen, a line each, and `remedy` what
    to do. `arms`, `metrics` and `opponent` are the rows it touches; empty means all of them.
    """

    code: str
    severity: Severity
    title: str
    evidence: tuple[str, ...] = ()
    remedy: str = ""
    arms: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    opponent: str = ""

    def touches(self, row: TableRow) -> bool:
        """Return whether a row is concerned: a finding of two arms or more concerns the rows
        between them, one of a single arm every row with that arm.
        """
        if self.metrics and row.metric not in self.metrics:
            return False
        if self.opponent and row.opponent != self.opponent:
            return False
        return not self.arms or len({*row.arms} & {*self.arms}) >= min(2, len({*self.arms}))


def find(arms: Arms, design: Design | None = None) -> list[Finding]:
    """Return what every check found, the heaviest first."""
    findings = dict.fromkeys(finding for check in CHECKS for finding in check(arms, design))
    order = {severity: number for number, severity in enumerate(SEVERITIES)}
    return sorted(
        findings,
        key=lambda finding: (order[finding.severity], finding.code, finding.arms, finding.title),
    )


def _pairs(arms: Arms) -> Iterator[tuple[ArmRuns, ArmRuns]]:
    return itertools.combinations(arms, 2)


def _metrics(logs: Iterable[EvalLog]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(metric.name for log in logs for metric in log.metrics))


def _by_eval(arms: Arms) -> dict[str, list[tuple[str, EvalLog]]]:
    logs: dict[str, list[tuple[str, EvalLog]]] = defaultdict(list)
    for name, log in arms.logs:
        logs[log.eval].append((name, log))
    return logs


# ---- One thing under two names ----


def check_same_model(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms that share runs, weights, or all of their answers."""
    del design
    remedy = "find out which arm it belongs to, and make the other's anew"
    for first, second in _pairs(arms):
        both, names = (first.name, second.name), f"{first.name} and {second.name}"
        shared = sorted({run.name for run in first.runs} & {run.name for run in second.runs})
        weights = _same_files(first, second)
        prints = _fingerprints(first) & _fingerprints(second)
        if shared:
            lines = tuple(f"runs/{name}" for name in shared)
            yield Finding("same-model", "error", f"{names} are one run", lines, remedy, both)
        elif weights:
            title = f"{names} have the same final weights, byte for byte"
            yield Finding("same-model", "error", title, tuple(weights), remedy, both)
        elif prints:
            lines = tuple(
                f"{run_place(log.file)}: weights {log.answers.fingerprint[:12]}"
                for log in (*first.logs, *second.logs)
                if log.answers.fingerprint in prints
            )
            title = f"The same weights answered for {names}"
            yield Finding("same-model", "error", title, lines, remedy, both)
        else:
            yield from _same_answers(first, second)
            yield from _former_opponent(first, second)
            yield from _former_opponent(second, first)


def _weights(arm: ArmRuns) -> dict[Path, int]:
    """Folders of final weights with the bytes in them."""
    folders = (run.folder / name for run in arm.runs for name in ("adapter", "model"))
    sizes = {
        folder: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in folders
    }
    return {folder: size for folder, size in sizes.items() if size}


def _same_files(first: ArmRuns, second: ArmRuns) -> list[str]:
    sizes = _weights(second)
    return [
        f"{run_place(folder)} and {run_place(other)}"
        for folder, size in _weights(first).items()
        for other, other_size in sizes.items()
        if size == other_size and folder_fingerprint(folder) == folder_fingerprint(other)
    ]


def _fingerprints(arm: ArmRuns) -> set[str]:
    return {log.answers.fingerprint for log in arm.logs} - {""}


def _same_answers(first: ArmRuns, second: ArmRuns) -> Iterator[Finding]:
    """Answers or judge's texts of one evaluation that are all the same in both arms."""
    logs = {(log.eval, log.against): log for log in second.logs}
    seen = set()
    for log in first.logs:
        other = logs.get((log.eval, log.against))
        if other is None or log.eval in seen:
            continue
        for what, read in (("answers", _answers), ("judge's texts", _judge_texts)):
            own_texts, other_texts = read(log), read(other)
            both = [
                (text, other_texts[key]) for key, text in own_texts.items() if key in other_texts
            ]
            if len(both) > 1 and all(a.split() == b.split() for a, b in both):
                seen.add(log.eval)
                yield Finding(
                    "same-answers",
                    "error",
                    f"All {what} of {first.name} and {second.name} in {log.eval} are the same",
                    (run_place(log.file), run_place(other.file)),
                    "equal models give equal answers; else one set is a copy: make it anew",
                    (first.name, second.name),
                    _metrics((log, other)),
                )
                break


def _answers(log: EvalLog) -> Mapping[Any, str]:
    samples = (sample for metric in log.metrics for sample in metric.samples)
    return {sample.key: sample.answer for sample in samples if sample.answer is not None}


def _judge_texts(log: EvalLog) -> Mapping[Any, str]:
    """What the judge wrote; nothing of one that gives probabilities, and of rules."""
    if log.judge is None or log.judge.mode == "logits":
        return {}
    return {
        (metric.metric, *sample.key): "\n".join(raw or "" for raw in sample.raws)
        for metric in log.metrics
        for sample in metric.samples
        if any(sample.raws) and not sample.by_rule
    }


def _former_opponent(arm: ArmRuns, rival: ArmRuns) -> Iterator[Finding]:
    """Verdicts against answers of a run that has other weights now."""
    runs = {run.name: run for run in rival.runs}
    for log in (log for log in arm.logs if log.against in runs and log.opponent):
        judged = log.opponent.fingerprint if log.opponent else ""
        evals = [other for other in runs[str(log.against)].evals if other.eval == log.eval]
        now = {other.answers.fingerprint for other in evals} - {""}
        if judged and now and judged not in now:
            yield Finding(
                "former-opponent",
                "error",
                f"{arm.name} was judged in {log.eval} against former answers of {rival.name}",
                (f"{run_place(log.file)}: weights {judged[:12]}", f"now {min(now)[:12]}"),
                f"recipes eval EVAL {log.file.parents[2].name} --against {log.against}",
                (arm.name, rival.name),
                tuple(metric.name for metric in log.metrics if metric.opponent),
                opponent=rival.name,
            )


def check_same_seeds(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield trainings of one arm with several seeds that ended with the same weights."""
    del design
    for arm in arms:
        folders = _weights(arm) if len(arm.runs) > 1 else {}
        prints: dict[str, list[Path]] = defaultdict(list)
        for folder, size in folders.items():
            if list(folders.values()).count(size) > 1:
                prints[folder_fingerprint(folder)].append(folder)
        for same in (same for same in prints.values() if len(same) > 1):
            yield Finding(
                "same-seeds",
                "error",
                f"{len(same)} trainings of {arm.name} ended with the same weights",
                tuple(map(run_place, same)),
                "one training must not count twice: did the seed reach the training?",
                (arm.name,),
            )


# ---- The judge ----


def check_judges(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield audits that failed or are not there, judges that differ, are weak or judge themselves,
    and comparisons of one order.
    """
    del design
    runs = {log.file: run for arm in arms for run in arm.runs for log in run.evals}
    failed: dict[str, list[str]] = defaultdict(list)  # by the judge's fingerprint
    audited: set[str] = set()  # fingerprints
    for name, log in arms.logs:
        if log.judge and log.audit:
            if not {check.check for check in log.audit.not_measured} >= ASKED_IN_AUDIT:
                audited.add(log.judge.fingerprint)
            for check in log.audit.failed:
                value = "n/a" if check.value is None else f"{check.value:.3f}"
                line = f"{name}, {log.eval}: {check.check} {value}, needs {check.needs}"
                failed[log.judge.fingerprint].append(line)
    for file, card in _labelled_audits(arms):
        audited.add(str(card["judge"]))
        for check in card.get("checks") or ():
            if check.get("result") == "fail":
                line = f"{file.parent.name}: {check['check']} {check.get('value')}"
                failed[str(card["judge"])].append(f"{line}, needs {check.get('needs')}")
    for name, judged in _by_eval(arms).items():
        logs = [(arm, log) for arm, log in judged if log.suite != "lm_eval"]
        with_judge = [(arm, log) for arm, log in logs if log.judge]
        if not with_judge:
            continue
        metrics = _metrics(log for _, log in logs)
        prints = dict.fromkeys(log.judge.fingerprint for _, log in with_judge if log.judge)
        lines = [line for key in prints for line in failed.get(key, ())]
        if lines:
            title = f"The judge of {name} failed its audit: {lines[0].partition(': ')[2]}"
            remedy = "use a stronger judge: recipes judge audit --judge JUDGE.yaml --labels FILE"
            yield Finding(
                "judge-failed-audit",
                "error",
                title,
                tuple(dict.fromkeys(lines)),
                remedy,
                (),
                metrics,
            )
        yield from _different_judges(name, logs, metrics)
        weak = dict.fromkeys(
            str(log.judge.weak) for _, log in with_judge if log.judge and log.judge.weak
        )
        if weak:
            title = f"The judge of {name} is a weak one"
            yield Finding(
                "weak-judge", "warning", title, tuple(weak), "use a stronger judge", (), metrics
            )
        if not all(log.judge.fingerprint in audited for _, log in with_judge if log.judge):
            title = f"The judge of {name} was not audited"
            line = "no probe and no pair that people labelled was put to it"
            remedy = "recipes judge audit --judge JUDGE.yaml --labels FILE"
            yield Finding(UNAUDITED, "warning", title, (line,), remedy, (), metrics)
        related = {
            arm: (kin, log) for arm, log in with_judge if (kin := _kinship(log, runs[log.file]))
        }
        if len(related) == len({arm for arm, _ in with_judge}):
            title = f"The judge of {name} is one of the models that it judges, or their base"
            remedy = "judge with a model of another family"
            yield Finding("self-judged", "error", title, (), remedy, (), metrics)
            related = {}
        for arm, (kin, log) in related.items():
            yield Finding(
                "self-judged",
                "error",
                f"{arm} was judged by {kin} in {name}",
                (run_place(log.file),),
                "judge with a model of another family",
                (arm,),
                metrics,
            )
        yield from _one_order(name, with_judge)


def _labelled_audits(arms: Arms) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every scorecard of a judge on labelled pairs that lies beside the runs."""
    roots = {run.folder.parent for arm in arms for run in arm.runs}
    for file in sorted(file for root in roots for file in root.glob("judge--*/*/judge_audit.json")):
        card = read_object(file)
        if card.get("judge"):
            yield file, card


def _different_judges(
    name: str, logs: Sequence[tuple[str, EvalLog]], metrics: tuple[str, ...]
) -> Iterator[Finding]:
    """Every two arms of other judges; one that is not recorded may be any."""
    judges: dict[str, set[str]] = defaultdict(set)
    for arm, log in logs:
        judge = log.judge
        known = f"{judge.name} {judge.fingerprint[:12]}".strip() if judge else "not recorded"
        judges[arm].add(known)
    for first, second in itertools.combinations(judges, 2):
        if len(judges[first] | judges[second]) > 1:
            yield Finding(
                "judges-differ",
                "error",
                f"Different judges judged {first} and {second} in {name}",
                tuple(f"{arm}: {', '.join(sorted(judges[arm]))}" for arm in (first, second)),
                "evaluate all arms with one judge",
                (first, second),
                metrics,
            )


def _kinship(log: EvalLog, run: Run) -> str:
    """What the judge is to the run whose answers it judged; empty where they are strangers."""
    judge = log.judge
    if judge is None or not judge.model:
        return ""
    model, home = judge.model.rstrip("/"), run.folder.resolve()
    path = Path(model)
    if (path.is_absolute() or path.exists()) and path.resolve().is_relative_to(home):
        return "its own weights"
    if run.name in (model, judge.run):
        return "itself"
    names = ((run.resolved.get("model") or {}).get("name_or_path"), *log.answers.models)
    if model.lower() in {str(name).rstrip("/").lower() for name in names if name}:
        return "itself" if run.is_base else "its base"
    own = {
        folder_fingerprint(run.folder / name)
        for name in (("merged", "model") if judge.weights else ())
        if (run.folder / name).is_dir()
    }
    if judge.weights in own:
        return "its own weights"
    base = base_weights(run).get("weights of the base")
    return "its base" if judge.weights and base == judge.weights[:12] else ""


def _one_order(name: str, logs: Sequence[tuple[str, EvalLog]]) -> Iterator[Finding]:
    """Comparisons of which each has one verdict only: a judge's preference for a position is part
    of the rate.
    """
    for arm, log in logs:
        for metric in log.metrics:
            single = sum(
                len(sample.verdicts) == 1 and not sample.by_rule for sample in metric.samples
            )
            if single and metric.opponent is not None:
                yield Finding(
                    "one-order",
                    "error",
                    f"{single} comparisons of {arm} in {name} were judged in one order only",
                    (run_place(log.file),),
                    "judge both orders (recipes eval does)",
                    (arm,),
                    (metric.name,),
                )


# ---- The answers ----


def check_answers(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms whose answers are often one text, empty, cut or in a loop, and arms that write
    much more than another.
    """
    del design
    for name, logs in _by_eval(arms).items():
        lengths: dict[str, list[int]] = defaultdict(list)
        worst: dict[tuple[str, str], tuple[float, int, int, EvalLog]] = {}
        for arm, log in logs:
            for metric in log.metrics[:1]:
                lengths[arm] += [sample.lengths[0] for sample in metric.samples if sample.lengths]
            for what, (times, n) in answer_faults(log).items():
                if log.suite == "checks" and what == CUT:
                    continue  # where more text could decide, the answer is counted both ways
                share = times / n if n else 0.0
                if times > 2 and share > max(SOME_DEGENERATE, worst.get((arm, what), (0.0,))[0]):
                    worst[arm, what] = share, times, n, log
        for (arm, what), (_, times, n, log) in worst.items():
            yield _faulty(arm, log, what, times, n)
        means = {arm: sum(some) / len(some) for arm, some in lengths.items() if some}
        judged = any(log.judge for _, log in logs)
        for pair in itertools.combinations(means, 2) if judged else ():
            short, long = sorted(pair, key=means.__getitem__)
            if means[long] >= LONGER * means[short] > 0:
                yield Finding(
                    "longer-answers",
                    "warning",
                    f"{long}'s answers in {name} are {means[long] / means[short]:.1f} times as long"
                    f" as {short}'s, and judges prefer long ones",
                    tuple(
                        f"{arm}: {means[arm]:,.0f} characters on average" for arm in (long, short)
                    ),
                    "",
                    (long, short),
                    _metrics(log for _, log in logs),
                )


def _faulty(arm: str, log: EvalLog, what: str, times: int, n: int) -> Finding:
    """That many answers are no answers, and the command that helps where they are cut."""
    remedy = "read some of the answers"
    if what == CUT:
        limit = ((log.recipe.get("generation") or {}).get("max_new_tokens")) or 0
        to = f"generation.max_new_tokens={2 * limit}" if limit else "generation.max_new_tokens=N"
        remedy = f"recipes eval EVAL {log.target or 'RUN'} {to}"
    return Finding(
        "degenerate-answers",
        "error" if times / n > DEGENERATE else "warning",
        f"{times} of {n} {arm} answers in {log.eval} {what}",
        (run_place(log.file),),
        remedy,
        (arm,),
        _metrics((log,)),
    )


def answer_faults(log: EvalLog) -> dict[str, tuple[int, int]]:
    """Return what is wrong with the answers of a log, in words, as (how many, of how many)."""
    if log.suite in ("lm_eval", "heldout_loss"):
        return {}
    samples = list(
        {sample.key: sample for metric in log.metrics for sample in metric.samples}.values()
    )
    answered = [sample for sample in samples if sample.answer is not None]
    faults = log.answers.faults
    faults_found: dict[str, tuple[int, int]] = {}
    if faults:
        faults_found["are empty"] = faults.empty, faults.n
        faults_found["end in a loop"] = faults.loops, faults.n
        if faults.cut is not None:
            faults_found[CUT] = faults.cut, faults.n
    if answered:
        fewest = 0 if log.judge else FEWEST_LETTERS
        texts = [sample.answer or "" for sample in answered]
        asked = [sample.id for sample in answered]
        same = one_and_the_same(texts, asked, fewest)
        faults_found["are one and the same"] = same, len(answered)
    elif faults:
        faults_found["are one and the same"] = faults.identical, faults.n
    return faults_found


# ---- What was asked, and how ----


def check_protocol(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield what differs between the evaluations of two arms."""
    for name, logs in _by_eval(arms).items():
        by_arm: dict[str, list[EvalLog]] = defaultdict(list)
        for arm, log in logs:
            by_arm[arm].append(log)
        for first, second in itertools.combinations(by_arm, 2):
            alike: dict[str, list[tuple[EvalLog, EvalLog]]] = defaultdict(list)
            for left, right in itertools.product(by_arm[first], by_arm[second]):
                opponent, other = arms.opponent(left.against), arms.opponent(right.against)
                if opponent == other:
                    alike[opponent or ""].append((left, right))
                elif opponent in (first, second):
                    alike[second].append((left, right))  # as their row head to head names it
                elif left.against in arms.of_run and right.against in arms.of_run:
                    alike[""].append((left, right))
            for opponent, pairs in alike.items():
                findings = [_settings_differ(first, second, *pair, design) for pair in pairs]
                findings += [_texts_differ(first, second, *pair) for pair in pairs]
                findings += [_facts_differ(first, second, *pair, design) for pair in pairs]
                # the first of each kind: every pair of seeds says the same again
                kinds = {finding.code: finding for finding in reversed(findings) if finding}
                yield from (replace(finding, opponent=opponent) for finding in kinds.values())
        subsets = {f"{arm}: {log.subset}": None for arm, log in logs if log.subset}
        if subsets:
            title = f"{name} asked a part of its questions"
            metrics = _metrics(log for _, log in logs)
            yield Finding(
                "subset", "warning", title, tuple(subsets), "ask all of them", (), metrics
            )


def _settings(log: EvalLog, of_prompt: bool) -> dict[str, Any]:
    """How an evaluation asked, by dotted key."""
    values = {
        key: value for key, value in flatten(dict(log.recipe)).items() if not _FREE.fullmatch(key)
    }
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
    return values


def _settings_differ(
    first: str, second: str, first_log: EvalLog, second_log: EvalLog, design: Design | None
) -> Finding | None:
    of_prompt = design is None or not design.declares("data.prompt_format", "data")
    settings, other_settings = _settings(first_log, of_prompt), _settings(second_log, of_prompt)
    known = (
        {*settings} & {*other_settings}
        if first_log.source or second_log.source
        else {*settings} | {*other_settings}
    )
    keys = [key for key in dict.fromkeys([*settings, *other_settings]) if key in known]
    keys = [key for key in keys if settings.get(key) != other_settings.get(key)]
    if not keys:
        return None
    lines = (
        f"{key}: {first} {setting_text(settings.get(key))},"
        f" {second} {setting_text(other_settings.get(key))}"
        for key in keys
    )
    title = (
        f"{first} and {second} were asked differently in {first_log.eval}: {sentence_list(keys, 3)}"
    )
    remedy = "evaluate both with one eval recipe"
    arms, metrics = (first, second), _metrics((first_log, second_log))
    return Finding("protocol-differs", "error", title, tuple(lines), remedy, arms, metrics)


def _texts_differ(
    first: str, second: str, first_log: EvalLog, second_log: EvalLog
) -> Finding | None:
    """Items of one id that were about another question, or another answer of one opponent."""
    other_items = {
        (metric.key, item.key): item for metric in second_log.metrics for item in metric.samples
    }
    asked: set[str] = set()
    opposed: set[str] = set()
    for metric in first_log.metrics:
        for item in metric.samples:
            same = other_items.get((metric.key, item.key))
            if same is None:
                continue
            if _differ(item.input, same.input):
                asked.add(item.id)
            elif first_log.against == second_log.against and _differ(item.opponent, same.opponent):
                opposed.add(item.id)
    kinds = (("the question", asked), (f"the answer of {first_log.against}", opposed))
    lines = [f"{what} differs for {len(ids)} ids, {min(ids)} is one" for what, ids in kinds if ids]
    if not lines:
        return None
    return Finding(
        "texts-differ",
        "error",
        f"{first} and {second} were asked other texts under the same ids in {first_log.eval}",
        tuple(lines),
        "evaluate both with one file of questions and one of reference answers",
        (first, second),
        _metrics((first_log, second_log)),
    )


def _differ(text: str | None, other_text: str | None) -> bool:
    return text is not None and other_text is not None and text.strip() != other_text.strip()


def _facts_differ(
    first: str, second: str, first_log: EvalLog, second_log: EvalLog, design: Design | None
) -> Finding | None:
    """Precision of the answers, versions and code of two evaluations."""
    facts = []
    for log in (first_log, second_log):
        precision = {
            "precision of the answers": log.answers.dtype,
            "quantized": log.answers.quantized,
        }
        declared = design and design.declares(
            "quantization", "quantization.load_in_4bit", "model.dtype"
        )
        code = str(log.git.get("commit") or "")[:12] or None
        dirty = f"{code} with changes" if code and log.git.get("dirty") else code
        facts.append({**({} if declared else precision), **log.libraries, "code": dirty})
    keys = [
        key
        for key in facts[0]
        if None not in (facts[0][key], facts[1].get(key)) and facts[0][key] != facts[1][key]
    ]
    if not keys:
        return None
    lines = (f"{key}: {first} {facts[0][key]}, {second} {facts[1][key]}" for key in keys)
    return Finding(
        "evaluated-differently",
        "confound",
        f"{first} and {second} were evaluated with other {sentence_list(keys, 3)}"
        f" in {first_log.eval}",
        tuple(lines),
        "evaluate both again with one version",
        (first, second),
        _metrics((first_log, second_log)),
    )


# ---- Trainings ----


def check_differences(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield what differs between two trained arms and no factor declares."""
    for first, second in _pairs(arms):
        differences = arm_differences(first, second, design)
        both = (first.name, second.name)
        confounds = [difference for difference in differences if difference.level == "confound"]
        lines = tuple(difference.line(*both) for difference in confounds)
        names = sentence_list([difference.what for difference in confounds], 4)
        if design is None and confounds:
            title = f"{first.name} and {second.name} differ in {names}"
            remedy = "a study declares what is meant to differ, so that a cause can be named"
            yield Finding("differences", "note", title, lines, remedy, both)
        elif confounds:
            title = (
                f"{first.name} and {second.name} also differ in {names}, which no factor declares"
            )
            remedy = "give both the same values, or declare them under factors"
            yield Finding("undeclared-difference", "confound", title, lines, remedy, both)


def check_base(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms that were trained on other weights than their base was evaluated with."""
    del design
    for base, arm in itertools.permutations(arms, 2):
        if not base.is_base or arm.is_base:
            continue
        now, then = (
            {value for run in group.runs for value in base_weights(run).values()}
            for group in (base, arm)
        )
        if now and then and now != then:
            lines = (f"{base.name}: {min(now)}, {arm.name}: {min(then)}",)
            title = f"{arm.name} was trained on other weights than {base.name} has"
            remedy = "evaluate the base that it was trained on"
            yield Finding("other-base", "error", title, lines, remedy, (arm.name, base.name))


def check_leaks(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms that were trained on questions of an evaluation, and those nobody searched."""
    del design
    unknown: dict[str, dict[str, None]] = defaultdict(dict)
    for arm in arms:
        seen = set()
        for log in arm.logs if not arm.is_base else ():
            questions = (log.recipe.get("data") or {}).get("questions")
            if log.eval in seen or not log.metrics or not is_searched(log.suite, questions):
                continue
            seen.add(log.eval)
            metrics = _metrics(other for other in arm.logs if other.eval == log.eval)
            if log.leaks is None or log.leaks.why:
                unknown[log.eval][arm.name] = None
            elif log.leaks.found:
                yield Finding(
                    "leaked-questions",
                    "error" if log.leaks.is_error else "warning",
                    f"{arm.name}: {log.leaks.summary(log.eval)}",
                    (*log.leaks.lines(5), run_place(log.file)),
                    "train without these rows, or ask other questions",
                    (arm.name,),
                    metrics,
                )
    for name, who in unknown.items():
        title = (
            f"Nobody searched the training rows of {sentence_list([*who])} for questions of {name}"
        )
        yield Finding(
            "leaks-not-searched", "warning", title, (), "", tuple(who)[:1] if len(who) == 1 else ()
        )


def check_selection(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield values and checkpoints that were chosen by what is compared, or at the edge of a grid,
    and studies of many arms.
    """
    trained = [arm.name for arm in arms if not arm.is_base]
    if len(trained) >= MANY_ARMS:
        title = f"The best of {len(trained)} arms looks better than it is"
        lines = (f"arms: {', '.join(trained)}", "Holm's correction does not shrink the lead itself")
        yield Finding(
            "best-of-many", "warning", title, lines, "train the best one again with new seeds"
        )
    on_validation = tuple(
        dict.fromkeys(
            metric.name
            for _, log in arms.logs
            if (log.recipe.get("data") or {}).get("questions") == "validation"
            for metric in log.metrics
        )
    )
    for arm in arms:
        tuned = design.tuned.get(arm.name) if design else None
        best = any(
            (run.resolved.get("train") or {}).get("load_best_model_at_end") for run in arm.runs
        )
        if tuned and tuned.edge:
            title = f"{arm.name} is best at the {tuned.edge} {tuned.key} that was tried"
            line = f"{tuned.key}: {tuned.chosen} of {', '.join(map(str, tuned.values))}"
            remedy = "its best may lie beyond: add a value there to the grid of every arm"
            yield Finding("tuned-at-edge", "confound", title, (line,), remedy, (arm.name,))
        if (tuned or best) and on_validation:
            what = tuned.key if tuned else "checkpoint"
            title = f"The validation rows chose the {what} of {arm.name}"
            remedy = "a loss on them is too good: compare on data.questions: test"
            yield Finding(
                "chosen-on-validation", "warning", title, (), remedy, (arm.name,), on_validation
            )
    for first, second in _pairs(arms) if design else ():
        tuned_first, tuned_second = (
            (design.tuned.get(arm.name) for arm in (first, second)) if design else (None, None)
        )
        grids = [
            (tuned.key, tuned.values) if tuned else None for tuned in (tuned_first, tuned_second)
        ]
        if grids[0] != grids[1] and not (first.is_base or second.is_base):
            title = f"{first.name} and {second.name} were not tuned over the same values"
            remedy = "tune under the study's own key, not under an arm's"
            names = (first.name, second.name)
            yield Finding("tuned-differently", "confound", title, (), remedy, names)


def check_presence(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield trainings and evaluations that are not finished."""
    del design
    for arm in arms:
        for run in arm.runs:
            place = (run_place(run.folder),)
            state = run.state.get("state")
            if state in ("failed", "preempted", "running", "created") and run.evals:
                title = f"{run.name} is {state}, not finished, and was evaluated"
                yield Finding(
                    "not-finished",
                    "error",
                    title,
                    place,
                    "finish it, and evaluate again",
                    (arm.name,),
                )
            if run.unfinished:
                title = (
                    f"{arm.name} has no result of {sentence_list(run.unfinished)}, which was begun"
                )
                remedy = "the same recipes eval command finishes it and asks nothing twice"
                yield Finding("unfinished-evaluation", "warning", title, place, remedy, (arm.name,))


_Check = Callable[[Arms, Design | None], Iterator[Finding]]
CHECKS: tuple[_Check, ...] = (
    check_same_model,
    check_same_seeds,
    check_judges,
    check_answers,
    check_protocol,
    check_differences,
    check_base,
    check_leaks,
    check_selection,
    check_presence,
)
