"""What is wrong with the judge or with how it was asked: audits, orders, turns, and what a foreign
source made of its verdicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.compare.findings import Finding, Severity
from recipes_lib.compare.validity.settings import run_place
from recipes_lib.compare.wording import sentence_list
from recipes_lib.core.json_files import read_object
from recipes_lib.generation.fingerprints import folder_fingerprint, hash_of

if TYPE_CHECKING:
    from recipes_lib.compare.design import Study
    from recipes_lib.compare.measurements import Measurements, RunMeasurements
    from recipes_lib.eval_log import EvalLog, Measure

NOT_AUDITED = "judge-not-audited"
DEGENERATE = 0.2  # share of answers that are one text, empty or cut, above which nothing is said
_OWN_WORDS = "verdicts against the judge's own words"
# What a failed check of the audit is called here, and what to do.
_CHECKS = {
    "swap consistency": (
        "order-flips",
        "The judge's verdict often changes with the order of the answers",
        "use a stronger judge",
    ),
    "judgments without a verdict": (
        "unparsed-share",
        "Too many of the judge's texts hold no verdict",
        "read some of them (recipes judge audit), or use mode: logits",
    ),
    _OWN_WORDS: (
        "contradictory-verdicts",
        "Many verdicts are the opposite of what the judge's own text says",
        (
            "read some of them, and judge again with a prompt and a parser of its own format"
            " (recipes eval)"
        ),
    ),
}
_FAILED = (
    "judge-failed-audit",
    "The judge failed its audit",
    "use a stronger judge, or show with human labels that it can be believed",
)
# Findings of `recipes judge replay` that are said here too: severity, title, what to do.
_REPLAYED: dict[str, tuple[Severity, str, str]] = {
    "unparsed-as-tie": (
        "warning",
        "Judgments without a verdict were counted as ties",
        "here they have no value and widen the interval; the published number counts them",
    ),
    "unparsed-left-out": (
        "warning",
        "Judgments without a verdict were left out of the published numbers",
        "here they have no value and widen the interval",
    ),
    "empty-answer-wins": (
        "warning",
        "Empty answers were counted as wins",
        "judge again: an empty answer loses",
    ),
    "turn-without-context": (
        "warning",
        "Second turns were judged without the first turn of their conversation",
        (
            "judge again with the conversation in front of the judge (recipes eval"
            " evals/mt_bench.yaml)"
        ),
    ),
    "repeated-judgments": (
        "warning",
        "Questions were judged twice",
        "keep one judgment per question",
    ),
    "constant-answer": (
        "warning",
        "One answer was given to many questions",
        "look at the answers: one text for many questions wins or loses them all at once",
    ),
    "not-in-the-judges-format": (
        "warning",
        "Verdicts were read from texts that do not end in the judge's verdict format",
        "judge again: a verdict read from a text that ends in none is a guess",
    ),
}


def check_judging(study: Study | None, measurements: Measurements) -> Iterator[Finding]:
    """Yield what was found about verdicts; a judge that failed somewhere is not believed anywhere
    in that evaluation.
    """
    del study
    # A finding about no metric would be about all of them.
    results = [
        (name, result)
        for name, arm in measurements.arms.items()
        for run in arm.runs
        for result in run.evals
        if result.measures
    ]
    evals: dict[str, list[tuple[str, EvalLog]]] = defaultdict(list)
    for name, result in results:
        evals[result.eval].append((name, result))
    yield from _weak(results)
    yield from _on_labels(measurements, results)
    yield from _not_audited(measurements, results)
    for found in evals.values():
        yield from _audits(found, results)
        yield from _different_judges(found)
        yield from _of_itself(measurements, found)
        yield from _degenerate(measurements, found)
        yield from _one_order(found)
        yield from _missing_turns(found)
        yield from _replayed(found)


def judged_metrics(found: Sequence[tuple[str, EvalLog]]) -> tuple[str, ...]:
    """Return the names of all metrics of an evaluation."""
    return tuple(dict.fromkeys(measure.name for _, result in found for measure in result.measures))


def _audits(
    found: Sequence[tuple[str, EvalLog]], everything: Sequence[tuple[str, EvalLog]]
) -> Iterator[Finding]:
    """One finding per kind of failed check, with every arm's value; it concerns all that the same
    judge judged.
    """
    judges = {_fingerprint(result) for _, result in found} - {None}
    same = [(name, result) for name, result in everything if _fingerprint(result) in judges]
    metrics = judged_metrics([*found, *same])
    failed: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, result in found:
        card = result.result.get("audit") or {}
        for check in card.get("checks") or ():
            if check["result"] == "fail":
                failed[_CHECKS.get(check["check"], _FAILED)].append(
                    _line(card, check, name, result.file)
                )
    for (code, title, remedy), evidence in failed.items():
        yield Finding(
            code, "error", f"{title} in {found[0][1].eval}", tuple(evidence), remedy, (), metrics
        )


def _on_labels(
    measurements: Measurements, results: Sequence[tuple[str, EvalLog]]
) -> Iterator[Finding]:
    """Audits on human labels (`recipes judge audit JUDGE.yaml`) that the judges of these results
    failed.
    """
    for file, card in _labelled(measurements):
        mine = [
            (name, result)
            for name, result in results
            if _fingerprint(result) and _fingerprint(result) == card.get("judge")
        ]
        lines = tuple(
            _line(card, check, file.parent.name, file)
            for check in card.get("checks") or ()
            if check["result"] == "fail"
        )
        if mine and lines:
            title = f"The judge failed its audit on {file.parent.name}"
            yield Finding(_FAILED[0], "error", title, lines, _FAILED[2], (), judged_metrics(mine))


def _labelled(measurements: Measurements) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every scorecard of a judge on labelled pairs that lies beside the runs."""
    roots = {run.folder.parent for arm in measurements.arms.values() for run in arm.runs}
    for file in sorted(file for root in roots for file in root.glob("judge--*/*/judge_audit.json")):
        yield file, read_object(file)


def _not_audited(
    measurements: Measurements, results: Sequence[tuple[str, EvalLog]]
) -> Iterator[Finding]:
    """Per judge the checks that nothing measured: neither the audits of these results nor one on
    labelled pairs.

    A judge that writes no text (mode logits) has no words of its own to contradict.
    """
    judges: dict[str, list[tuple[str, EvalLog]]] = defaultdict(list)
    for name, result in results:
        if result.result.get("judge"):
            judges[_fingerprint(result) or f"unknown, of {result.eval}"].append((name, result))
    labelled = [card for _, card in _labelled(measurements)]
    for fingerprint, found in judges.items():
        cards = [result.result.get("audit") or {} for _, result in found] + [
            card for card in labelled if card.get("judge") == fingerprint
        ]
        states: dict[str, set[str]] = defaultdict(set)
        for check in (check for card in cards for check in card.get("checks") or ()):
            states[check["check"]].add(check["result"])
        if found[0][1].result["judge"].get("mode") == "logits":
            states.pop(_OWN_WORDS, None)
        missing = (
            [check for check, seen in states.items() if seen == {"not measured"}]
            if states
            else ["anything"]
        )
        if missing:
            evals = sentence_list(list(dict.fromkeys(result.eval for _, result in found)))
            title = f"The audit of the judge of {evals} did not measure {sentence_list(missing)}"
            arms: dict[str, dict[str, None]] = defaultdict(dict)
            for name, result in found:
                arms[result.eval][name] = None
            evidence = tuple(f"{name}: {sentence_list(list(mine))}" for name, mine in arms.items())
            remedy = (
                "recipes judge audit --judge JUDGE.yaml --labels FILE... measures every check; then"
                " write the report again"
            )
            yield Finding(NOT_AUDITED, "error", title, evidence, remedy, (), judged_metrics(found))


def _of_itself(
    measurements: Measurements, found: Sequence[tuple[str, EvalLog]]
) -> Iterator[Finding]:
    """Arms that were judged by themselves, by their base or by their adapter merged into it; judges
    prefer what they would write.
    """
    runs = {
        result.file: run
        for arm in measurements.arms.values()
        for run in arm.runs
        for result in run.evals
    }
    lines: dict[str, str] = {}
    for name, result in found:
        whose = _kinship(result.result.get("judge") or {}, result, runs[result.file])
        if whose:
            lines[name] = (
                f"{name}: judged by {whose}, {result.result['judge']['model']}"
                f" ({run_place(result.file)})"
            )
    title = f"The judge is a model that it judges, or its base, in {found[0][1].eval}"
    yield from _per_arm(
        found,
        "self-judged",
        "error",
        title,
        lines,
        "judge with a model of another family",
        judged_metrics(found),
    )


def _kinship(judge: dict[str, Any], result: EvalLog, run: RunMeasurements) -> str:
    """What the judge is to the run whose answers it judged; empty where they are strangers, as far
    as files tell.
    """
    model, weights = str(judge.get("model") or "").rstrip("/"), judge.get("weights")
    if not model:
        return ""
    path = Path(model)
    if (path.is_absolute() or path.exists()) and path.resolve().is_relative_to(
        run.folder.resolve()
    ):
        return "its own weights"
    if model == run.name or judge.get("run") == run.name:
        return "itself, merged" if judge.get("run") else "itself"
    section = run.resolved.get("model") or {}
    answers = result.result.get("answers") or {}
    names = {
        str(name).rstrip("/").lower()
        for name in (section.get("name_or_path"), *(answers.get("models") or ()))
        if name
    }
    if model.lower() in names:
        return "itself" if run.is_base or run.imported else "its base"
    if weights and weights in {
        folder_fingerprint(run.folder / name)
        for name in ("merged", "model")
        if (run.folder / name).is_dir()
    }:
        return "its own weights"
    adapter = run.folder / "adapter"
    precision = [section.get("dtype"), run.resolved.get("quantization")]
    trained = folder_fingerprint(adapter) if adapter.is_dir() else None
    if weights and answers.get("fingerprint") == hash_of(weights, precision, trained):
        return "its base" if trained else "itself"
    return ""


def _degenerate(
    measurements: Measurements, found: Sequence[tuple[str, EvalLog]]
) -> Iterator[Finding]:
    """Arms of whose answers more than a fifth are one and the same text, empty or cut: their
    verdicts are about that.

    A tenth of them is a warning.
    """
    told: dict[str, dict[tuple[str, str], tuple[float, int, int, str]]] = defaultdict(
        dict
    )  # by arm, the first file that tells it
    for name, result in found:
        opponent = measurements.opponent_name(result.against)
        sides = [(name, result.result.get("answers"))]
        sides += (
            [(opponent if opponent in measurements.arms else name, result.result.get("opponent"))]
            if opponent
            else []
        )
        for whose, facts in sides:
            answers = ((facts or {}).get("answers") or {}) if isinstance(facts, dict) else {}
            n, same = answers.get("n") or 0, answers.get("identical") or {}
            counts = {
                "are one and the same": same.get("count"),
                "are empty": answers.get("empty"),
                "are cut": answers.get("cut"),
            }
            for what, count in ((what, count or 0) for what, count in counts.items()):
                if count > 2 and (facts or {}).get("name"):
                    told[str(whose)].setdefault(
                        (str((facts or {})["name"]), what),
                        (count / n, count, n, run_place(result.file)),
                    )
    faults: tuple[tuple[Severity, str, float, float], ...] = (
        ("error", "fifth", DEGENERATE, 1.0),
        ("warning", "tenth", 0.1, DEGENERATE),
    )
    for severity, part, above, most in faults:
        by_arm: dict[str, str] = {}
        for whose, mine in told.items():
            lines = [
                f"{count} of {n} answers{'' if name == whose else f' of {name}'} {what} ({file})"
                for (name, what), (share, count, n, file) in mine.items()
                if above < share <= most
            ]
            by_arm |= {whose: f"{whose}: {'; '.join(lines)}"} if lines else {}
        title = (
            f"More than a {part} of the answers are one and the same, empty or cut in"
            f" {found[0][1].eval}"
        )
        remedy = "look at the answers; raise generation.max_new_tokens where they are cut"
        yield from _per_arm(
            found, "degenerate-answers", severity, title, by_arm, remedy, judged_metrics(found)
        )


def _fingerprint(result: EvalLog) -> str | None:
    return (result.result.get("judge") or {}).get("fingerprint")


def _line(card: dict[str, Any], check: dict[str, Any], whose: str, file: Path) -> str:
    """A failed check with its value."""
    value = "n/a" if check["value"] is None else f"{check['value']:.3f}"
    return (
        f"{whose}: {check['check']} {value}, needs {check['needs']}{_detail(card, check)}"
        f" ({run_place(file)})"
    )


def _weak(results: Sequence[tuple[str, EvalLog]]) -> Iterator[Finding]:
    """Judges whose own file says that they are weak, each with the evaluations it judged."""
    reasons: dict[str, list[tuple[str, EvalLog]]] = defaultdict(list)
    for name, result in results:
        if reason := (result.result.get("judge") or {}).get("weak"):
            reasons[str(reason)].append((name, result))
    for reason, found in reasons.items():
        evals = " and ".join(dict.fromkeys(result.eval for _, result in found))
        title = f"The judge of {evals} is a weak one"
        yield Finding(
            "weak-judge",
            "warning",
            title,
            (reason,),
            "use a judge that can judge (evals/judges/)",
            (),
            judged_metrics(found),
        )


def _detail(card: dict[str, Any], check: dict[str, Any]) -> str:
    """How many verdicts contradict, and whom that favours."""
    told = card.get("contradictions") or {}
    if check["check"] != _OWN_WORDS or not told.get("decidable"):
        return ""
    return f"; {told['count']} of {told['decidable']} decidable, {told['direction']}"


def _different_judges(found: Sequence[tuple[str, EvalLog]]) -> Iterator[Finding]:
    """Arms of one evaluation that different judges judged."""
    judges: dict[str, list[str]] = defaultdict(list)
    for name, result in found:
        judge = result.result.get("judge") or {}
        if result.suite != "lm_eval":  # a judge that is not recorded may be any other one
            judges[
                f"{judge.get('name') or 'a judge that is not recorded'}"
                f" {str(judge.get('fingerprint') or '')[:12]}".strip()
            ].append(name)
    if len(judges) > 1:
        evidence = tuple(
            f"{judge}: {', '.join(dict.fromkeys(arms))}" for judge, arms in judges.items()
        )
        title = f"Different judges judged the arms in {found[0][1].eval}"
        yield Finding(
            "judges-differ",
            "error",
            title,
            evidence,
            "evaluate all arms with one judge",
            (),
            judged_metrics(found),
        )


def _measures(
    found: Sequence[tuple[str, EvalLog]], wanted: Callable[[Measure], bool]
) -> Iterator[tuple[str, Measure, EvalLog]]:
    for name, result in found:
        for measure in result.measures:
            if measure.samples and wanted(measure):
                yield name, measure, result


def _one_order(found: Sequence[tuple[str, EvalLog]]) -> Iterator[Finding]:
    """Comparisons of which each has one verdict only. Where the order was always the same the
    position is part of every rate.
    """
    lines: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for name, measure, result in _measures(found, lambda one: one.metric == "win_rate"):
        single = sum(len(item.verdicts) == 1 and not item.by_rule for item in measure.samples)
        if single:
            fixed = any("always first" in flag for flag in result.result.get("flags") or ())
            lines[fixed][name] = (
                f"{name}: {single} of {len(measure.samples)} comparisons have one verdict"
                f" ({run_place(result.file)})"
            )
    metrics = tuple(
        dict.fromkeys(
            one.name for _, result in found for one in result.measures if one.opponent is not None
        )
    )
    for fixed, by_arm in lines.items():
        title = f"Answers were judged in one order only in {found[0][1].eval}" + (
            ", the model's always first" if fixed else ""
        )
        remedy = (
            "judge both orders (recipes eval does): a judge's preference for a position is part of"
            " this rate"
        )
        yield from _per_arm(
            found,
            "one-order-judging",
            "error" if fixed else "warning",
            title,
            by_arm,
            remedy,
            metrics,
        )


def _per_arm(
    found: Sequence[tuple[str, EvalLog]],
    code: str,
    severity: Severity,
    title: str,
    by_arm: dict[str, str],
    remedy: str,
    metrics: tuple[str, ...],
) -> Iterator[Finding]:
    """One finding where every arm of an evaluation is concerned, else one per arm."""
    if len(by_arm) > 1 and by_arm.keys() == {name for name, _ in found}:
        yield Finding(code, severity, title, tuple(by_arm.values()), remedy, (), metrics)
        return
    for name, line in by_arm.items():
        yield Finding(code, severity, title, (line,), remedy, (name,), metrics)


def _missing_turns(found: Sequence[tuple[str, EvalLog]]) -> Iterator[Finding]:
    """Turns without a judgment that other questions, or the same question of another arm, have."""
    metrics: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for _, measure, _ in _measures(found, lambda one: one.suite == "mt_bench"):
        metrics[measure.name] |= {item.key for item in measure.samples}
    for name, measure, result in _measures(found, lambda one: one.suite == "mt_bench"):
        turns: dict[str, set[int]] = defaultdict(set)
        for question, turn in metrics[measure.name]:
            turns[question].add(turn)
        every = set().union(*turns.values())
        mine = {item.key for item in measure.samples}
        answered = {item.id for item in measure.samples}
        missing = sorted(
            (question, turn)
            for question in answered
            for turn in every
            if (question, turn) not in mine
        )
        if missing:
            shown = ", ".join(f"question {question} turn {turn}" for question, turn in missing[:5])
            count = "1 turn" if len(missing) == 1 else f"{len(missing)} turns"
            title = (
                f"{count} of {name} in {result.eval} {'has' if len(missing) == 1 else 'have'} no"
                f" judgment: {shown}"
            )
            evidence = (
                (
                    f"{len(mine)} of {len(answered) * len(every)} turns are judged"
                    f" ({run_place(result.file)})"
                ),
            )
            remedy = "judge it: a turn that is left out leaves the mean too high or too low"
            yield Finding(
                "missing-turn", "warning", title, evidence, remedy, (name,), (measure.name,)
            )


def _replayed(found: Sequence[tuple[str, EvalLog]]) -> Iterator[Finding]:
    """What `recipes judge replay` found in the files that arms were imported from."""
    lines: dict[str, dict[str, str]] = defaultdict(dict)
    for name, result in found:
        for report in result.result.get("replays") or ():
            for finding in report.get("findings") or ():
                lines[finding["name"]][name] = (
                    f"{name}: {finding['message']} ({run_place(result.file)})"
                )
    for code, by_arm in lines.items():
        if code in _REPLAYED:
            severity, title, remedy = _REPLAYED[code]
            yield from _per_arm(
                found,
                code,
                severity,
                f"{title} in {found[0][1].eval}",
                by_arm,
                remedy,
                judged_metrics(found),
            )
