"""Suites that a judge decides, and the audit of a judge on labelled pairs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from recipes_lib.core.files import Row, write_json
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import run_lock
from recipes_lib.core.terminal import count
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.audit import audit, audit_banner, audit_note, by_item, probe_items, sample_of
from recipes_lib.evals.items import Item
from recipes_lib.evals.judge import Judge, opened
from recipes_lib.evals.judgments import ask
from recipes_lib.evals.log import (
    EvalLog,
    JudgmentRow,
    Metric,
    Sample,
    Scorecard,
    Store,
    log_file,
    text_hash,
)
from recipes_lib.evals.questions import TURNED, Question, pair_texts, read_labels
from recipes_lib.evals.recipe import load_judge_file
from recipes_lib.evals.suites import Suite, metric_of


class JudgedSuite(Suite):
    """A suite that a judge decides: it says how the judge is asked about an answer."""

    def item(
        self, question: Question, turn: int, answers: Answers, opponent: Answers | None
    ) -> Item:
        """Return what the judge is asked: to grade an answer, or to compare it with another."""
        raise NotImplementedError

    def items(self, answers: Answers, opponent: Answers | None = None) -> Iterator[Item]:
        """Yield what the judge is asked about all answers."""
        for question in self.chosen.questions:
            for turn, said in enumerate(question.turns, 1):
                place = question.id, turn
                sample = {
                    "turn": turn,
                    "category": question.category or "all",
                    "input": said,
                    "answer": answers.text(place),
                    "opponent": opponent.text(place) if opponent else None,
                    "cut": place in answers.cut,
                }
                unanswered = answers.unanswered.get(place, "")
                if opponent and not unanswered:
                    unanswered = opponent.unanswered.get(place, "")
                yield replace(
                    self.item(question, turn, answers, opponent),
                    question_id=question.id,
                    sample=sample,
                    unanswered=unanswered,
                )

    def write(self, log: EvalLog) -> None:
        """Write files for other programs beside a log."""


# ---- one model ----


def judge_model(
    suite: JudgedSuite, answers: Answers, opponent: Answers | None, judge: Judge, probes: list[Row]
) -> EvalLog:
    """Have a judge give every verdict on a model that is missing, audit it, and return the log.

    Args:
        opponent: whose answers the model's are compared with, where the suite does that.
        probes: the judgments of probes, which are made with the answers of the first model.
    """
    assert answers.run is not None
    recipe = suite.recipe
    against = opponent.name if opponent else None
    items = list(suite.items(answers, opponent))
    file = log_file(answers.run.path, recipe.name, against)
    with run_lock(file.parent, wait=True):
        store = Store(_judgments_file(file), JudgmentRow)
        rows = ask(items, judge, store, answers.name)
        if not probes:
            probed = list(probe_items(items, recipe.metrics.probe_pairs))
            if probed:
                probes += rows
                probes += ask(probed, judge, store, "probes")
    card = audit(rows, recipe.thresholds, _labels(items, suite.chosen.labels), probes)
    log = suite.new_log(
        [_metric(suite, _samples(items, rows), opponent)],
        target=answers.name,
        against=against,
        n=len(suite.chosen.questions),
        subset=suite.chosen.subset,
        banners=_banners(judge, card, answers, opponent),
        notes=_notes(suite, card, answers, opponent),
        answers=answers.facts,
        opponent=opponent.facts if opponent else None,
        judge=judge.facts(),
        audit=card,
        file=file,
    )
    suite.write(log)
    return log


def _judgments_file(result: Path) -> Path:
    """Return the file of judgments beside a result."""
    return result.with_name(f"judgments{result.name.removeprefix('result')}l")


def _samples(items: Sequence[Item], rows: Sequence[Row]) -> list[Sample]:
    """Return the outcome of each item."""
    judged = by_item(rows)
    samples = []
    for item in items:
        judgments = judged[item.name]
        samples.append(sample_of(item.question_id, judgments, item.orders, **item.sample))
    return samples


def _metric(suite: JudgedSuite, samples: Sequence[Sample], opponent: Answers | None) -> Metric:
    """Return the win rate against an opponent, or the mean grade."""
    if opponent:
        label = _label(suite, "win rate")
        return metric_of("win_rate", label, samples, opponent=opponent.name)
    return metric_of("grade", _label(suite, "mean grade (1-5)"), samples, "grade")


def _label(suite: JudgedSuite, metric: str) -> str:
    """Return a metric's name for people: only published questions make it that of the benchmark."""
    if suite.chosen.published:
        return f"{suite.title} {metric}"
    return f"{metric} on {suite.recipe.name}"


def _labels(items: Sequence[Item], outcomes: Mapping[tuple[str, str, str], str]) -> dict[str, str]:
    """Return what people said of these pairs, by the name of the item.

    Args:
        outcomes: by instruction, answer and opponent's answer, in whichever order they were shown.
    """
    labels: dict[str, str] = {}
    if not outcomes:
        return labels
    for item in items:
        instruction, answer, other = pair_texts(item.instruction, item.answer, str(item.opponent))
        label = outcomes.get((instruction, answer, other))
        turned = outcomes.get((instruction, other, answer))
        if label:
            labels[item.name] = label
        elif turned:
            labels[item.name] = TURNED[turned]
    return labels


def _banners(
    judge: Judge, card: Scorecard, answers: Answers, opponent: Answers | None
) -> tuple[str, ...]:
    """Return what must be read before the numbers, heaviest first."""
    banners = []
    if judge.section.weak:
        banners.append(f"Weak judge: {judge.section.weak}.")
    failed = audit_banner(card)
    if failed:
        banners.append(failed)
    # bases included: a model that was fine-tuned from the judge counts too
    judged_models = set(answers.facts.models)
    if opponent:
        judged_models.update(opponent.facts.models)
    model = judge.section.model
    if model in judged_models:
        banners.append(f"{model} judges its own answers: expect self-preference")
    return tuple(banners)


def _notes(
    suite: JudgedSuite, card: Scorecard, answers: Answers, opponent: Answers | None
) -> tuple[str, ...]:
    """Return what is said beside the numbers."""
    notes = list(answers.notes)
    if opponent:
        notes += opponent.notes
    missing = audit_note(card)
    if missing:
        notes.append(missing)
    bare = suite.chosen.without_reference
    if bare and not opponent:
        num = count(len(bare), "question")
        notes.append(f"{num} graded without the reference needed: {', '.join(bare[:8])}")
    return tuple(notes)


# ---- recipes judge audit ----


def audit_on_labels(
    judge: str, labels: Path, limit: int | None, probe_pairs: int
) -> tuple[Scorecard, Path]:
    """Judge labelled pairs; return the scorecard, and where the judgments are kept:
    runs/judge--<judge>/<labels>/.

    Args:
        limit: how many pairs, drawn by hash: a larger limit keeps the judged ones.
    """
    file = load_judge_file(judge)
    outcomes = read_labels(labels)
    pairs = {text_hash("\0".join(texts))[:16]: texts for texts in outcomes}
    chosen = dict(sorted(pairs.items())[:limit])
    items = [
        Item(name=name, instruction=instruction, answer=answer, opponent=opponent)
        for name, (instruction, answer, opponent) in chosen.items()
    ]
    folder = runs_root() / f"judge--{_plain_name(Path(judge))}" / _plain_name(labels)
    with run_lock(folder, wait=True), opened(file.judge) as opened_judge:
        store = Store(folder / "judgments.jsonl", JudgmentRow)
        rows = ask(items, opened_judge, store, "labelled pairs")
        probed = list(probe_items(items, probe_pairs))
        probes = ask(probed, opened_judge, store, "probes")
    label_of = {name: outcomes[texts] for name, texts in chosen.items()}
    card = audit(rows, file.thresholds, label_of, [*rows, *probes])
    write_json(folder / "judge_audit.json", asdict(card))  # compare and report read it
    return card, store.path


def _plain_name(file: Path) -> str:
    """Return a file's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", file.stem)
