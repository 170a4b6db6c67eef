"""What is wrong with the judge or with how it was asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from recipes_lib.compare.findings import NOT_AUDITED, Finding, found
from recipes_lib.compare.measurements import RunMeasurements
from recipes_lib.compare.validity.case import Case, evals_of, metrics_of, pairs, run_place
from recipes_lib.compare.wording import count, sentence_list
from recipes_lib.core.fingerprints import folder_fingerprint, hash_of
from recipes_lib.core.json_files import read_object
from recipes_lib.eval_log import AnswerFacts, EvalLog, JudgeFacts, Measure, Sample, Scorecard
from recipes_lib.suites.alpaca_eval import own_length_controlled

LONGER = 1.5  # times as long as another arm's answers, from which on it is said
DEGENERATE = 0.2  # share of answers with one fault, above which nothing is said
_OWN_WORDS = "verdicts against the judge's own words"
# What a failed check of the audit is called here; any other one is judge-failed-audit.
_CHECKS = {
    "swap consistency": "order-flips",
    "judgments without a verdict": "unparsed-share",
    _OWN_WORDS: "contradictory-verdicts",
}
Logs = list[tuple[str, EvalLog]]  # with their arms
Cards = list[tuple[Path, Scorecard]]  # with their files


def check_judging(case: Case) -> Iterator[Finding]:
    """Yield what was found about verdicts; a judge that failed somewhere is not believed anywhere
    in that evaluation.
    """
    # A finding about no metric would be about all of them.
    logs = [(name, log) for name, log in case.logs if log.measures]
    evals: dict[str, Logs] = defaultdict(list)
    for name, log in logs:
        evals[log.eval].append((name, log))
    labelled = list(_labelled(case))
    yield from _weak(logs)
    yield from _audits_on_labels(labelled, logs)
    yield from _not_audited(labelled, logs)
    for mine in evals.values():
        yield from _audits(mine, logs)
        yield from _different_judges(mine)
        yield from _of_itself(case, mine)
        yield from _degenerate(case, mine)
        yield from _longer(case, mine)
        yield from _one_order(mine)
        yield from _missing_turns(mine)


def _judge(log: EvalLog) -> JudgeFacts:
    return log.judge or JudgeFacts()


def _metrics(logs: Logs) -> tuple[str, ...]:
    return metrics_of(log for _, log in logs)


def _evals(logs: Logs) -> tuple[str, ...]:
    return evals_of(log for _, log in logs)


def _failed(card: Scorecard, whose: str, file: Path) -> Iterator[tuple[str, str]]:
    """Every failed check of an audit as (code, what was measured)."""
    for check in card.get("checks") or ():
        if check["result"] == "fail":
            value = "n/a" if check["value"] is None else f"{check['value']:.3f}"
            told = card.get("contradictions")
            detail = ""  # how many verdicts contradict, and whom that favours
            if check["check"] == _OWN_WORDS and told and told["decidable"]:
                detail = f"; {told['count']} of {told['decidable']} decidable, {told['direction']}"
            yield (
                _CHECKS.get(check["check"], "judge-failed-audit"),
                f"{whose}: {check['check']} {value}, needs {check['needs']}{detail}"
                f" ({run_place(file)})",
            )


def _audits(logs: Logs, everything: Logs) -> Iterator[Finding]:
    """One finding per kind of failed check; it concerns all that the same judge judged."""
    judges = {_judge(log).fingerprint for _, log in logs} - {None}
    same = [one for one in everything if _judge(one[1]).fingerprint in judges]
    failed: dict[str, list[str]] = defaultdict(list)
    for name, log in logs:
        for code, line in _failed(log.audit or {}, name, log.file):
            failed[code].append(line)
    for code, lines in failed.items():
        yield found(code, lines, (), _metrics([*logs, *same]), eval=logs[0][1].eval)


def _audits_on_labels(labelled: Cards, logs: Logs) -> Iterator[Finding]:
    """Audits on human labels (`recipes judge audit JUDGE.yaml`) that these judges failed."""
    for file, card in labelled:
        mine = [one for one in logs if (_judge(one[1]).fingerprint or "") == card["judge"]]
        labels = file.parent.name
        lines = [line for _, line in _failed(card, labels, file)]
        if mine and lines:
            yield found("judge-failed-audit/labels", lines, (), _metrics(mine), labels=labels)


def _labelled(case: Case) -> Iterator[tuple[Path, Scorecard]]:
    """Every scorecard of a judge on labelled pairs that lies beside the runs."""
    roots = {run.folder.parent for arm in case.arms.values() for run in arm.runs}
    for file in sorted(file for root in roots for file in root.glob("judge--*/*/judge_audit.json")):
        card = cast(Scorecard, read_object(file))
        if card.get("judge"):
            yield file, card


def _not_audited(labelled: Cards, logs: Logs) -> Iterator[Finding]:
    """Per judge the checks that nothing measured: neither the audits of these results nor one on
    labelled pairs. A judge that writes no text (mode logits) has no words of its own to contradict.
    """
    judges: dict[str, Logs] = defaultdict(list)
    for name, log in logs:
        if log.judge:
            unknown = f"unknown, of {log.eval}"
            judges[_judge(log).fingerprint or unknown].append((name, log))
    for fingerprint, mine in judges.items():
        cards = [
            *(log.audit or {} for _, log in mine),
            *(card for _, card in labelled if card["judge"] == fingerprint),
        ]
        states: dict[str, set[str]] = defaultdict(set)
        for check in (check for card in cards for check in card.get("checks") or ()):
            states[check["check"]].add(check["result"])
        if _judge(mine[0][1]).mode == "logits":
            states.pop(_OWN_WORDS, None)
        missing = [check for check, seen in states.items() if seen == {"not measured"}]
        if missing or not states:
            arms = {one: [name for name, log in mine if log.eval == one] for one in _evals(mine)}
            yield found(
                NOT_AUDITED,
                [f"{one}: {sentence_list([*dict.fromkeys(names)])}" for one, names in arms.items()],
                (),
                _metrics(mine),
                eval=sentence_list(_evals(mine)),
                missing=sentence_list(missing or ["anything"]),
            )


def _per_arm(
    kind: str, logs: Logs, by_arm: Mapping[str, str], metrics: Iterable[str]
) -> Iterator[Finding]:
    """One finding where every arm of an evaluation is concerned, else one per arm."""
    if len(by_arm) > 1 and by_arm.keys() == {name for name, _ in logs}:
        yield found(kind, by_arm.values(), (), metrics, eval=logs[0][1].eval)
        return
    for name, line in by_arm.items():
        yield found(kind, [line], (name,), metrics, eval=logs[0][1].eval)


def _of_itself(case: Case, logs: Logs) -> Iterator[Finding]:
    """Arms that were judged by themselves, by their base or by their adapter merged into it."""
    runs = {log.file: run for arm in case.arms.values() for run in arm.runs for log in run.evals}
    lines = {
        name: f"{name}: judged by {whose}, {_judge(log).model} ({run_place(log.file)})"
        for name, log in logs
        if (whose := _kinship(log, runs[log.file]))
    }
    yield from _per_arm("self-judged", logs, lines, _metrics(logs))


def _kinship(log: EvalLog, run: RunMeasurements) -> str:
    """What the judge is to the run whose answers it judged; empty where they are strangers."""
    judge = _judge(log)
    model, weights = (judge.model or "").rstrip("/"), judge.weights
    if not model:
        return ""
    path, home = Path(model), run.folder.resolve()
    if (path.is_absolute() or path.exists()) and path.resolve().is_relative_to(home):
        return "its own weights"
    if model == run.name or judge.run == run.name:
        return "itself, merged" if judge.run else "itself"
    section = run.resolved.get("model") or {}
    names = (section.get("name_or_path"), *log.answers.models)
    if model.lower() in {str(name).rstrip("/").lower() for name in names if name}:
        return "itself" if run.is_base else "its base"
    prints = {
        name: folder_fingerprint(run.folder / name)
        for name in (("merged", "model", "adapter") if weights else ())
        if (run.folder / name).is_dir()
    }
    trained = prints.pop("adapter", None)
    if weights and weights in prints.values():
        return "its own weights"
    precision = [section.get("dtype"), run.resolved.get("quantization")]
    if weights and log.answers.fingerprint == hash_of(weights, precision, trained):
        return "its base" if trained else "itself"
    return ""


def _degenerate(case: Case, logs: Logs) -> Iterator[Finding]:
    """Arms of whose answers more than a fifth are one and the same text, empty, cut or end in a
    loop: their verdicts are about that.

    A tenth of them is a warning. Rules are not misled by such answers: they fail, or are unresolved
    where they were cut.
    """
    # By arm, the first file that tells each share.
    told: dict[str, dict[tuple[str, str], tuple[float, str]]] = defaultdict(dict)
    for name, log in logs:
        if log.judge is None:
            continue
        opponent = case.measurements.opponent_name(log.against)
        sides: list[tuple[str, AnswerFacts | None]] = [(name, log.answers)]
        if opponent:
            arm = opponent if opponent in case.measurements.arms else name
            sides.append((arm, log.opponent))
        for whose, facts in sides:
            answers, given = (facts.answers, facts.name) if facts else (None, None)
            if answers is None or not given:
                continue
            faults = {
                "are one and the same": answers.identical.count,
                "are empty": answers.empty,
                "are cut": answers.cut,
                "end in a phrase that stands there three times": answers.loops,
            }
            for what, times in faults.items():
                if times and times > 2:
                    of = "" if given == whose else f" of {given}"
                    line = f"{times} of {answers.n} answers{of} {what} ({run_place(log.file)})"
                    told[whose].setdefault((given, what), (times / answers.n, line))
    for kind, above, most in (
        ("degenerate-answers", DEGENERATE, 1.0),
        ("degenerate-answers/tenth", 0.1, DEGENERATE),
    ):
        lines = {
            whose: "; ".join(line for share, line in mine.values() if above < share <= most)
            for whose, mine in told.items()
        }
        by_arm = {whose: f"{whose}: {line}" for whose, line in lines.items() if line}
        yield from _per_arm(kind, logs, by_arm, _metrics(logs))


def _longer(case: Case, logs: Logs) -> Iterator[Finding]:
    """Two arms of which one writes half as much again, with the win rates at equal length."""
    measures: dict[str, list[Measure]] = defaultdict(list)
    for name, log in logs:
        if log.judge is not None:
            measures[name] += [one for one in log.measures if any(it.lengths for it in one.samples)]
    lengths = {
        name: [item.lengths[0] for one in mine for item in one.samples if item.lengths]
        for name, mine in measures.items()
    }
    mean = {name: sum(some) / len(some) for name, some in lengths.items() if some}
    for pair in pairs(mean):
        short, long = sorted(pair, key=mean.__getitem__)
        if mean[long] >= LONGER * mean[short] > 0:
            equal = list(_at_equal_length(case, long, short, measures))
            yield found(
                "longer-answers",
                [f"{name}: {mean[name]:,.0f} characters on average" for name in (long, short)],
                (long, short),
                _metrics(logs),
                eval=logs[0][1].eval,
                times=mean[long] / mean[short],
                equal="".join(f"; {one}" for one in equal),
            )


def _at_equal_length(
    case: Case, long: str, short: str, measures: Mapping[str, Sequence[Measure]]
) -> Iterator[str]:
    """Yield what the win rates of two arms would be at equal length."""
    pairs_of: dict[tuple[str, str], list[Sample]] = defaultdict(list)  # by arm and opponent
    for name in (long, short):
        for measure in (one for one in measures[name] if one.metric == "win_rate"):
            opponent = case.measurements.opponent_name(measure.opponent)
            pairs_of[name, str(opponent)] += [it for it in measure.samples if len(it.lengths) == 2]
    rates = {key: _rates(samples) for key, samples in pairs_of.items() if samples}
    known = {key: rate for key, rate in rates.items() if rate is not None}
    for (name, opponent), (raw, equal) in known.items():
        if {name, opponent} == {long, short}:
            turned = (raw - 50) * (equal - 50) < 0
            words = f"{name} wins {equal:.1f}% against {opponent}"
        elif name == long and (short, opponent) in known:
            its_raw, its_equal = known[short, opponent]
            turned = (raw - its_raw) * (equal - its_equal) < 0
            words = f"{long} wins {equal:.1f}% and {short} {its_equal:.1f}% against {opponent}"
        else:
            continue
        yield f"at equal length {words}{', which is the other way round' if turned else ''}"


def _rates(samples: Sequence[Sample]) -> tuple[float, float] | None:
    """The win rate in percent, raw and at equal length."""
    equal = own_length_controlled(samples)["estimate"]
    values = [one.value for one in samples if one.value is not None]
    return None if equal is None else (100 * sum(values) / len(values), equal)


def _weak(logs: Logs) -> Iterator[Finding]:
    """Judges whose own file says that they are weak, each with the evaluations it judged."""
    reasons: dict[str, Logs] = defaultdict(list)
    for name, log in logs:
        if reason := _judge(log).weak:
            reasons[str(reason)].append((name, log))
    for reason, mine in reasons.items():
        yield found("weak-judge", [reason], (), _metrics(mine), eval=" and ".join(_evals(mine)))


def _different_judges(logs: Logs) -> Iterator[Finding]:
    """Arms of one evaluation that different judges judged."""
    judges: dict[str, dict[str, None]] = defaultdict(dict)
    for name, log in logs:
        judge = _judge(log)
        if log.suite != "lm_eval":  # a judge that is not recorded may be any other one
            known = judge.name or "a judge that is not recorded"
            judges[f"{known} {(judge.fingerprint or '')[:12]}".strip()][name] = None
    if len(judges) > 1:
        evidence = [f"{judge}: {', '.join(arms)}" for judge, arms in judges.items()]
        yield found("judges-differ", evidence, (), _metrics(logs), eval=logs[0][1].eval)


def _one_order(logs: Logs) -> Iterator[Finding]:
    """Comparisons of which each has one verdict only. Where the order was always the same the
    position is part of every rate.
    """
    kinds: dict[str, dict[str, str]] = defaultdict(dict)
    measures = [(name, log, one) for name, log in logs for one in log.measures]
    for name, log, measure in measures:
        single = sum(len(item.verdicts) == 1 and not item.by_rule for item in measure.samples)
        if single and measure.metric == "win_rate":
            fixed = any("always first" in flag for flag in log.flags)
            kinds["one-order-judging" if fixed else "one-order-judging/mixed"][name] = (
                f"{name}: {single} of {len(measure.samples)} comparisons have one verdict"
                f" ({run_place(log.file)})"
            )
    metrics = dict.fromkeys(one.name for _, _, one in measures if one.opponent is not None)
    for kind, lines in kinds.items():
        yield from _per_arm(kind, logs, lines, metrics)


def _missing_turns(logs: Logs) -> Iterator[Finding]:
    """Turns without a judgment that other questions, or another arm, have."""
    measures = [
        (name, log, measure)
        for name, log in logs
        for measure in log.measures
        if measure.samples and measure.suite == "mt_bench"
    ]
    turns: dict[str, set[int]] = defaultdict(set)
    for _, _, measure in measures:
        turns[measure.name] |= {item.turn for item in measure.samples}
    for name, log, measure in measures:
        every, mine = turns[measure.name], {item.place for item in measure.samples}
        answered = {question for question, _ in mine}
        missing = sorted({(question, turn) for question in answered for turn in every} - mine)
        if missing:
            whole = len(answered) * len(every)
            yield found(
                "missing-turn",
                [f"{len(mine)} of {whole} turns are judged ({run_place(log.file)})"],
                (name,),
                (measure.name,),
                turns=count(len(missing), "turn"),
                have="has" if len(missing) == 1 else "have",
                eval=log.eval,
                missing=", ".join(f"question {asked} turn {turn}" for asked, turn in missing[:5]),
            )
