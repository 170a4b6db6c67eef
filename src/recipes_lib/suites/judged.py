"""What the two judged suites share: asking one judge for all targets, its audit with probes, and
the banner above every result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes_lib.core.atomic_files import write_text
from recipes_lib.core.json_files import DamagedFile, read_object
from recipes_lib.core.project import runs_root
from recipes_lib.core.terminal import warn
from recipes_lib.eval_log import REFERENCE
from recipes_lib.generation.judges import OpenJudge
from recipes_lib.generation.progress import Progress
from recipes_lib.judging.audit import audit, probe_requests, self_judged
from recipes_lib.judging.judge import Item, JudgePlan, JudgeRun, ask, build_requests
from recipes_lib.judging.store import JudgmentStore, Row
from recipes_lib.statistics.intervals import Interval
from recipes_lib.suites.answering import AnswerSet
from recipes_lib.weights.merge import RECORD as MERGE_RECORD


@dataclass
class Judged:
    """One target's judgments: the rows of each kind in the order of the requests, and what asking
    them took.
    """

    rows: list[Row] = field(default_factory=list)
    probes: list[Row] = field(default_factory=list)
    runs: list[JudgeRun] = field(default_factory=list)

    def add(self, other: Judged) -> None:
        """Take the rows of another batch."""
        self.rows += other.rows
        self.runs += other.runs


def judge_all(
    items: Sequence[Item], judge: OpenJudge, plan: JudgePlan, store: JudgmentStore, name: str
) -> Judged:
    """Ask what is missing and return all rows of these items.

    Raises:
        EvaluationIncomplete: judgments are missing; the same command continues.
    """
    requests = list(build_requests(items, plan, judge.judge.fingerprint))
    progress = Progress(f"judgments {name}", sum(request.key not in store for request in requests))

    def count(run: JudgeRun) -> None:
        progress.add(run.asked + run.by_rule + run.failed.total - progress.done)

    try:
        run = ask(iter(requests), judge.judge, store, plan, count)
    finally:
        progress.close()
    run.check_complete()
    return Judged([row for request in requests if (row := store.get(request.key))], [], [run])


def ask_probes(
    items: Sequence[Item], judge: OpenJudge, store: JudgmentStore, number: int
) -> list[Row]:
    """Put the degenerate probes of a few pairs before the judge, and return their rows."""
    plan = replace(judge.plan("relative"), rules=False)
    different = [
        item
        for item in items
        if item.opponent
        and item.answer.strip() not in ("", item.opponent.strip())
        and item.opponent.strip()
    ]
    requests = list(probe_requests(different[:number], plan, judge.judge.fingerprint))
    if not requests:
        return []
    progress = Progress("probes", sum(request.key not in store for request in requests))
    try:
        ask(
            iter(requests),
            judge.judge,
            store,
            plan,
            lambda run: progress.add(run.asked - progress.done),
        ).check_complete()
    finally:
        progress.close()
    return [row for request in requests if (row := store.get(request.key))]


def judgments_file(folder: Path, against: str) -> Path:
    """Return the file of judgments against one opponent: each has its own, because they judge the
    same answers.
    """
    return folder / (
        "judgments.jsonl" if against == "reference" else f"judgments.against-{against}.jsonl"
    )


def sample_file(folder: Path, name: str, opponent: AnswerSet | None) -> Path:
    """Return samples/<name>, with the opponent in the name unless it is the reference."""
    path = folder / "samples" / name
    if opponent is None or opponent.name == REFERENCE or name == "model_outputs.json":
        return path
    return path.with_name(f"{path.stem}.against-{opponent.name}{path.suffix}")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def judge_facts(judge: OpenJudge) -> dict[str, Any]:
    """Return what result.json says about the judge."""
    section = judge.file.judge
    names = (
        "model",
        "revision",
        "engine",
        "mode",
        "prompt_style",
        "temperature",
        "max_new_tokens",
        "max_context_tokens",
        "weak",
    )
    facts = {
        "name": judge.file.path.stem,
        "fingerprint": judge.judge.fingerprint,
        **{name: getattr(section, name) for name in names},
    }
    merged = Path(section.model) / MERGE_RECORD  # a judge that is one of our runs, merged
    return {**facts, "weights": judge.weights, "run": read_object(merged).get("run")}


def scorecard(judge: OpenJudge, judged: Judged) -> dict[str, Any]:
    """Return the judge's audit over one target's judgments and the probes."""
    return audit([*judged.rows, *judged.probes], judge.file.thresholds, None, judge.file.judge.weak)


def banners(
    answers: AnswerSet,
    opponent: AnswerSet | None,
    judge: OpenJudge,
    card: Mapping[str, Any],
    subset: str | None,
    faults: Mapping[str, Any],
) -> list[str]:
    """Return the lines that stand above a result, the heaviest first."""
    lines = [card["banner"]] if card.get("banner") else []
    models = [*answers.models, *(opponent.models if opponent else ())]
    if warning := self_judged(judge.file.judge.model, models):
        lines.append(warning)
    lines += answer_banners(answers, opponent, faults)
    return [*lines, *([subset] if subset else [])]


def failed_elsewhere(
    answers: AnswerSet,
    judge: OpenJudge,
    card: Mapping[str, Any],
    targets: Mapping[str, Mapping[str, Any]],
    evals: Mapping[str, Sequence[Mapping[str, Any]]],
    eval_name: str,
) -> list[str]:
    """Return the line about a judge that fails no check here and failed its audit on another target
    or in another eval.

    Args:
        card: the scorecard of this result.
        targets: the scorecards of this eval by target.
        evals: scorecards of this judge in evals that were made together with this one; earlier
            results of the run are read.
        eval_name: this evaluation's folder.
    """
    if _failures(card):
        return []
    found = {f"on {name}": _failures(other) for name, other in targets.items()}
    found |= {
        f"in {name}": next(filter(None, map(_failures, cards)), []) for name, cards in evals.items()
    }
    for path in sorted(answers.folder(eval_name).parent.glob("*/result*.json")):
        if path.parent.name != eval_name and f"in {path.parent.name}" not in found:
            stored = _earlier(path)
            if (stored.get("judge") or {}).get("fingerprint") == judge.judge.fingerprint:
                found[f"in {path.parent.name}"] = _failures(stored["audit"])
    for path in sorted(runs_root().glob("judge--*/*/judge_audit.json")):
        stored = _earlier(path)
        if stored.get("judge") == judge.judge.fingerprint:
            found[f"on labelled pairs ({path.parent.name})"] = _failures(stored)
    failed = next(((where, checks) for where, checks in found.items() if checks), None)
    return (
        [
            f"This judge failed its audit {failed[0]}: {'; '.join(failed[1])}. Its verdicts are not"
            " evidence."
        ]
        if failed
        else []
    )


def _earlier(path: Path) -> dict[str, Any]:
    """An earlier result; a damaged one says nothing about the judge, and must not stop an
    evaluation that has been paid for.
    """
    try:
        return read_object(path)
    except DamagedFile as error:
        warn(f"{str(error).splitlines()[0]}; left out")
        return {}


def _failures(card: Mapping[str, Any]) -> list[str]:
    return [
        f"{check['check']} {check['value']:.2f} (needs {check['needs']})"
        for check in card["checks"]
        if check["result"] == "fail"
    ]


def answer_banners(
    answers: AnswerSet, opponent: AnswerSet | None, faults: Mapping[str, Any]
) -> list[str]:
    """Return the lines about the answers themselves: the same answers twice, one answer for many
    questions, cut and empty ones.
    """
    lines = []
    if opponent is not None and opponent.digest == answers.digest:
        lines.append(
            f"{answers.name} and {opponent.name} gave the same answers: they are one model here and"
            " cannot be ranked"
        )
    same = faults["identical"]
    if same["flagged"]:
        lines.append(f"{same['count']} of {faults['n']} prompts got one and the same answer")
    for what, text in (("empty", "are empty"), ("cut", "reached max_new_tokens and are cut")):
        if faults[what] > 0.1 * faults["n"]:
            lines.append(f"{faults[what]} of {faults['n']} answers {text}")
    return lines


def within_scale(interval: Interval) -> dict[str, Any]:
    """Return an interval of a mean grade with its limits cut to the scale 1-5: with few items they
    would lie outside.
    """
    return {**interval.within(1.0, 5.0).to_dict(), "scale": "1-5"}


def statuses(rows: Iterable[Row]) -> dict[str, int]:
    """Count the statuses of verdicts."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return counts
