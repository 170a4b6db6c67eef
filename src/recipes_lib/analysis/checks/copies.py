"""One model under two names: runs, weights or answers that were copied, and outdated opponents."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from recipes_lib.analysis.aims import Design
from recipes_lib.analysis.findings import Finding, metric_names
from recipes_lib.analysis.printed_commands import evaluate_again
from recipes_lib.analysis.runs import ArmRuns, Arms, run_place
from recipes_lib.core.files import model_fingerprint
from recipes_lib.evals.log import EvalLog

# How two arms can be one model, the plainest first.
_ONE_RUN = "are one run"
_EQUAL_WEIGHTS = "have the same final weights, byte for byte"
_EQUAL_ANSWERERS = "were answered for by the same weights"
_ONE_MODEL = (_ONE_RUN, _EQUAL_WEIGHTS, _EQUAL_ANSWERERS)

# By one of `_ONE_MODEL` and the name or hash that is identical: the file that shows it, by run.
_Identities = dict[tuple[str, str], dict[str, str]]


def check_copies(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield arms that share a run, final weights or all answers, and seeds of equal weights."""
    identities = _identities(arms)
    # each log is in many pairs
    hashes = {id(log): _answer_hashes(log) for _, log in arms.logs}
    scores = {id(log): _scores(log) for _, log in arms.logs if log.source}
    for first, second in itertools.combinations(arms, 2):
        of_first = identities[first.name]
        of_second = identities[second.name]
        pair = (first.name, second.name)
        both = " and ".join(pair)
        shared = [key for key in of_first if key in of_second]
        if shared:
            files: list[str] = []
            for key in shared:
                files += [*of_first[key].values(), *of_second[key].values()]
            kind = min((kind for kind, _ in shared), key=_ONE_MODEL.index)
            title = f"{both} {kind}"
            evidence = tuple(dict.fromkeys(files))
            remedy = "find out which arm it belongs to, and redo the other's"
            yield Finding("same-model", "error", title, evidence=evidence, remedy=remedy, arms=pair)
            continue
        others = {(log.eval, log.against): log for log in second.logs}
        logs = {log.eval: log for log in first.logs if (log.eval, log.against) in others}
        for log in logs.values():
            other = others[log.eval, log.against]
            answers = hashes[id(log)]
            other_answers = hashes[id(other)]
            common = answers.keys() & other_answers.keys()
            finding = partial(
                Finding,
                evidence=(run_place(log.file), run_place(other.file)),
                arms=pair,
                metrics=metric_names((log, other)),
            )
            if len(common) > 1 and all(answers[key] == other_answers[key] for key in common):
                title = f"All answers of {both} in {log.eval} are the same"
                remedy = "equal models give equal answers; else one set is a copy: redo it"
                yield finding("same-answers", "error", title, remedy=remedy)
            elif len(scores.get(id(log), ())) > 1 and scores[id(log)] == scores.get(id(other)):
                title = f"Every score of {both} in {log.eval} is the same"
                remedy = "one may be a copy of the other, or both one model: look at the files"
                yield finding("same-scores", "warning", title, remedy=remedy)
    for arm in arms:
        yield from _copied_trainings(arm)
        for file_by_run in identities[arm.name].values():
            if len(file_by_run) > 1 and not arm.is_base:
                title = f"{len(file_by_run)} trainings of {arm.name} ended with the same weights"
                evidence = tuple(sorted(file_by_run))
                remedy = "one training must not count twice: did the seed reach the training?"
                yield Finding(
                    code="same-seeds",
                    severity="error",
                    title=title,
                    evidence=evidence,
                    remedy=remedy,
                    arms=(arm.name,),
                )


def _copied_trainings(arm: ArmRuns) -> Iterator[Finding]:
    """Yield trainings of other programs with the same answers and scores; no file has a hash of
    their weights.
    """
    files: dict[int, list[str]] = defaultdict(list)
    for run in arm.runs:
        if run.foreign and run.arm:
            samples = [sample for metric in run.metrics for sample in metric.samples]
            results = {(each.key, each.value, each.answer) for each in samples}
            files[hash(frozenset(results))].append(run_place(run.evals[0].file))
    for places in files.values():
        if len(places) > 1:
            title = f"{len(places)} trainings of {arm.name} have the same answers and scores"
            remedy = "one training must not count twice: leave out the copy"
            yield Finding(
                code="same-seeds",
                severity="error",
                title=title,
                evidence=tuple(places),
                remedy=remedy,
                arms=(arm.name,),
            )


def _identities(arms: Arms) -> dict[str, _Identities]:
    """What makes the runs of each arm one model with any other run that has it too."""
    by_arm: dict[str, _Identities] = {arm.name: defaultdict(dict) for arm in arms}
    weights_by_size: dict[int, list[tuple[str, str, Path]]] = defaultdict(list)
    for arm in arms:
        of_arm = by_arm[arm.name]
        for run in arm.runs:
            if not run.foreign:  # two models of another program may share a name
                of_arm[_ONE_RUN, run.name][run.name] = f"runs/{run.name}"
            for log in run.evals:
                if log.answers.fingerprint:
                    key = (_EQUAL_ANSWERERS, log.answers.fingerprint)
                    of_arm[key][run.name] = run_place(log.file)
            for folder in (run.folder / "adapter", run.folder / "model"):
                size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                weights_by_size[size].append((arm.name, run.name, folder))
    # Only weights of one size may be equal, so only these are read and hashed.
    for size, folders in weights_by_size.items():
        if size > 0 and len(folders) > 1:
            for name, run_name, folder in folders:
                key = (_EQUAL_WEIGHTS, model_fingerprint(folder))
                by_arm[name][key][run_name] = run_place(folder)
    return by_arm


def _answer_hashes(log: EvalLog) -> dict[tuple[str, int], int]:
    """Hashes of answers, whatever the whitespace in them, by question and turn."""
    samples = [sample for metric in log.metrics for sample in metric.samples]
    answered = [sample for sample in samples if sample.answer is not None]
    return {sample.key: hash(tuple((sample.answer or "").split())) for sample in answered}


def _scores(log: EvalLog) -> set[tuple[str, str, int, float | None]]:
    """Return the values of a log with their metric, question and turn."""
    return {
        (metric.name, *each.key, each.value) for metric in log.metrics for each in metric.samples
    }


def check_former_opponents(arms: Arms, design: Design | None) -> Iterator[Finding]:
    """Yield verdicts against answers of a run that has other weights now."""
    runs = {run.name: run for arm in arms for run in arm.runs}
    for arm, log in arms.logs:
        opponent = runs.get(log.against or "")
        if opponent is None or log.opponent is None:
            continue
        judged = log.opponent.fingerprint
        results = [result for result in opponent.evals if result.eval == log.eval]
        present = {result.answers.fingerprint for result in results} - {""}
        if judged and present and judged not in present:
            place = run_place(log.file)
            rival = arms.of_run[opponent.name]
            yield Finding(
                code="former-opponent",
                severity="error",
                title=f"{arm} was judged in {log.eval} against outdated answers of {opponent.name}",
                evidence=(f"{place}: weights {judged[:12]}", f"now {min(present)[:12]}"),
                remedy=evaluate_again(log, design),
                arms=(arm, rival),
                metrics=tuple(metric.name for metric in log.metrics if metric.opponent),
                opponent=rival,
            )
