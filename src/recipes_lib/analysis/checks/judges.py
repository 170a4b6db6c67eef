"""The judge: several of them, weak ones, not audited ones, relatives, and verdicts of one order."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.differences import base_weights
from recipes_lib.analysis.findings import UNAUDITED, Finding, metric_names
from recipes_lib.analysis.printed_commands import audit_again
from recipes_lib.analysis.runs import Arms, Run, run_place
from recipes_lib.analysis.text import sentence_list
from recipes_lib.core.files import model_fingerprint, read_object
from recipes_lib.evals.audit import HUMAN, PROBES
from recipes_lib.evals.log import EvalLog
from recipes_lib.evals.recipe import Thresholds

# What only an audit asks; the rest is measured from the judgments.
_ASKED_IN_AUDIT = {*PROBES.values(), HUMAN}


def check_judges(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield two arms of other judges, and comparisons that were judged in one order only."""
    for name, logs in _judged_evals(arms).items():
        finding = partial(Finding, metrics=metric_names(log for _, log in logs))
        judges: dict[str, set[str]] = defaultdict(set)
        for arm, log in logs:
            judge = "not recorded"  # it may be any
            if log.judge:
                judge = f"{log.judge.name} {log.judge.fingerprint[:12]}".strip()
            judges[arm].add(judge)
        for pair in itertools.combinations(judges, 2):
            first, second = pair
            if len(judges[first] | judges[second]) > 1:
                title = f"Different judges judged {first} and {second} in {name}"
                evidence = tuple(f"{arm}: {', '.join(sorted(judges[arm]))}" for arm in pair)
                remedy = "evaluate all arms with one judge"
                yield finding(
                    "judges-differ", "error", title, evidence=evidence, remedy=remedy, arms=pair
                )
        for arm, log in logs:
            single: list[str] = []
            for metric in log.metrics:
                by_judge = [sample for sample in metric.samples if not sample.by_rule]
                is_single = any(len(sample.verdicts) == 1 for sample in by_judge)
                if log.judge and metric.opponent is not None and is_single:
                    single.append(metric.name)
            if single:  # a judge's preference for a position is part of the rate
                yield Finding(
                    code="one-order",
                    severity="error",
                    title=f"Comparisons of {arm} in {name} were judged in one order only",
                    evidence=(run_place(log.file),),
                    remedy="judge both orders",
                    arms=(arm,),
                    metrics=tuple(dict.fromkeys(single)),
                )


def _judged_evals(arms: Arms) -> dict[str, list[tuple[str, EvalLog]]]:
    """The results, with their arm, of each evaluation in which some were judged."""
    by_eval: dict[str, list[tuple[str, EvalLog]]] = defaultdict(list)
    for arm, log in arms.logs:
        if log.suite != "lm_eval":  # which asks no judge
            by_eval[log.eval].append((arm, log))
    return {name: logs for name, logs in by_eval.items() if any(log.judge for _, log in logs)}


def check_kinship(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield judges that judged themselves, their base or what was trained from them."""
    kin_of_arm: dict[str, dict[str, str]] = defaultdict(dict)
    for arm in arms:
        for run in arm.runs:
            for log in run.evals:
                kin = _kinship(log, run)
                if kin:
                    kin_of_arm[log.eval][arm.name] = kin
    evals = _judged_evals(arms)
    for name, kins in kin_of_arm.items():
        finding = partial(Finding, metrics=metric_names(log for _, log in evals[name]), of_any=True)
        phrases = [f"{arm} was judged by {kin}" for arm, kin in kins.items()]
        title = f"{sentence_list(phrases)} in {name}"
        remedy = "use an unrelated judge"
        yield finding("self-judged", "error", title, remedy=remedy, arms=tuple(kins))


def _kinship(log: EvalLog, run: Run) -> str:
    """What the judge is to the run whose answers it judged; empty where they are strangers."""
    judge = log.judge
    if judge is None or not judge.model or log.suite == "lm_eval":
        return ""
    model = judge.model.rstrip("/")
    is_folder = Path(model).is_dir() and not run.foreign  # of another program: a name elsewhere
    if (judge.weights or is_folder) and Path(model).resolve().is_relative_to(run.folder.resolve()):
        return "its own weights"
    if run.name == model:
        return "itself"
    base_or_self = "itself" if run.is_base else "its base"
    base = (run.resolved.get("model") or {}).get("name_or_path")
    names = {str(name).rstrip("/").lower() for name in (base, *log.answers.models) if name}
    if model.lower() in names:
        return base_or_self
    if not judge.weights:
        return ""
    for folder in (run.folder / "merged", run.folder / "model"):
        if folder.is_dir() and model_fingerprint(folder) == judge.weights:
            return "its own weights"
    is_copy_of_base = base_weights(run) == judge.weights[:12]  # in another folder
    return base_or_self if is_copy_of_base else ""


def check_audits(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield judges that are weak, failed an audit, had none, or one that asked too little."""
    failed, audited = _audits(arms)
    for name, logs in _judged_evals(arms).items():
        finding = partial(Finding, metrics=metric_names(log for _, log in logs))
        judges = {log.judge.fingerprint: log.judge for _, log in logs if log.judge}
        lines: list[str] = []
        for judge in judges:
            lines += failed.get(judge, ())
        if lines:
            reason = lines[0].partition(": ")[2]
            title = f"The judge of {name} failed its audit: {reason}"
            evidence = tuple(dict.fromkeys(lines))
            remedy = "use a stronger judge, such as those in evals/judges"
            yield finding("judge-failed-audit", "error", title, evidence=evidence, remedy=remedy)
        if not judges.keys() <= audited:
            first_log = next(log for _, log in logs if log.judge)
            title = f"The judge of {name} was not audited"
            remedy = audit_again(first_log, design)
            yield finding(UNAUDITED, "warning", title, remedy=remedy)
        lowered = [lowered_thresholds(log) for _, log in logs]
        if any(lowered):
            title = f"The judge of {name} had to reach less than the shipped thresholds"
            evidence = tuple(dict.fromkeys(filter(None, lowered)))
            remedy = "use the shipped thresholds, or a stronger judge"
            yield finding("lowered-thresholds", "warning", title, evidence=evidence, remedy=remedy)
        weak = [judge.weak for judge in judges.values() if judge.weak]
        if weak:
            title = f"The judge of {name} is weak"
            evidence = tuple(dict.fromkeys(weak))
            remedy = "use a stronger judge"
            yield finding("weak-judge", "warning", title, evidence=evidence, remedy=remedy)


def _audits(arms: Arms) -> tuple[dict[str, list[str]], set[str]]:
    """The failed checks by judge, and the judges audited in an evaluation or beside the runs."""
    failed: dict[str, list[str]] = defaultdict(list)
    audited: set[str] = set()
    for arm, log in arms.logs:
        if log.judge is None or log.audit is None:
            continue
        judge = log.judge.fingerprint
        if not {check.check for check in log.audit.not_measured} >= _ASKED_IN_AUDIT:
            audited.add(judge)
        for check in log.audit.failed:
            value = "n/a" if check.value is None else f"{check.value:.3f}"
            failed[judge].append(f"{arm}, {log.eval}: {check.check} {value}, needs {check.needs}")
    for root in sorted({run.folder.parent for _, run in arms.runs}):
        for file in sorted(root.glob("judge--*/*/judge_audit.json")):
            card = read_object(file)
            judge = str(card.get("judge"))
            audited.add(judge)
            for row in card.get("checks") or ():
                if row.get("result") == "fail":
                    line = f"{row['check']} {row.get('value')}, needs {row.get('needs')}"
                    failed[judge].append(f"{file.parent.name}: {line}")
    return failed, audited


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
