"""Suites that a judge decides, and the audit of a judge on labelled pairs."""

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
from recipes_lib.evals.judge import Judge, opened
from recipes_lib.evals.judgments import Item, ask
from recipes_lib.evals.log import EvalLog, JudgmentRow, Scorecard, Store, log_file, text_hash
from recipes_lib.evals.questions import TURNED, PairTexts, Question, pair_texts, read_labels
from recipes_lib.evals.recipe import load_judge_file
from recipes_lib.evals.suites import Suite, metric_of

_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


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
    chosen = suite.chosen
    against = opponent.name if opponent else None
    items = list(suite.items(answers, opponent))
    file = log_file(answers.run.path, recipe.name, against)
    with run_lock(file.parent, wait=True):
        judgments_file = file.with_name(f"judgments{file.name.removeprefix('result')}l")
        store = Store(judgments_file, JudgmentRow)
        rows = ask(items, judge, store, f"{answers.name} on {recipe.name}")
        if not probes:
            probed = list(probe_items(items, recipe.metrics.probe_pairs))
            if probed:
                probes += rows
                probes += ask(probed, judge, store, "probes")
    card = audit(rows, recipe.thresholds, _labels(items, chosen.labels), probes)

    judged = by_item(rows)
    samples = []
    for item in items:
        judgments = judged[item.name]
        samples.append(sample_of(item.question_id, judgments, item.orders, **item.sample))
    metric = "win_rate"
    title = "win rate"
    if opponent is None:
        metric = "grade"
        title = "mean grade (1-5)"
    label = f"{title} on {recipe.name}"
    if chosen.published:
        # else the number is not that of the benchmark
        label = f"{suite.title} {title}"

    notes = list(answers.notes)
    if opponent:
        notes += opponent.notes
    missing = audit_note(card)
    if missing:
        notes.append(missing)
    ungraded = chosen.without_reference
    if ungraded and not opponent:
        num = count(len(ungraded), "question")
        notes.append(f"{num} graded without the reference needed: {', '.join(ungraded[:8])}")
    log = suite.new_log(
        [metric_of(metric, label, samples, opponent=against)],
        target=answers.name,
        against=against,
        n=len(chosen.questions),
        subset=chosen.subset,
        banners=_banners(judge, card, answers, opponent),
        notes=tuple(notes),
        answers=answers.facts,
        opponent=opponent.facts if opponent else None,
        judge=judge.facts(),
        audit=card,
        file=file,
    )
    suite.write(log)
    return log


def _labels(items: Sequence[Item], outcomes: Mapping[PairTexts, str]) -> dict[str, str]:
    """What people said of these pairs, in whichever order they saw them, by the item's name."""
    labels: dict[str, str] = {}
    for item in items:
        instruction, answer, other = pair_texts(item.instruction, item.answer, str(item.opponent))
        turned = outcomes.get((instruction, other, answer))
        if turned:
            labels[item.name] = TURNED[turned]
        # a pair that was labelled in both orders has the same label in both (`read_labels`)
        if (instruction, answer, other) in outcomes:
            labels[item.name] = outcomes[instruction, answer, other]
    return labels


def _banners(
    judge: Judge, card: Scorecard, answers: Answers, opponent: Answers | None
) -> tuple[str, ...]:
    """What must be read before the numbers, heaviest first."""
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
    judge_name = _NOT_IN_NAMES.sub("-", Path(judge).stem)
    folder = runs_root() / f"judge--{judge_name}" / _NOT_IN_NAMES.sub("-", labels.stem)
    with run_lock(folder, wait=True), opened(file.judge) as opened_judge:
        store = Store(folder / "judgments.jsonl", JudgmentRow)
        rows = ask(items, opened_judge, store, "labelled pairs")
        probed = list(probe_items(items, probe_pairs))
        probes = ask(probed, opened_judge, store, "probes")
    label_of = {name: outcomes[texts] for name, texts in chosen.items()}
    card = audit(rows, file.thresholds, label_of, [*rows, *probes])
    write_json(folder / "judge_audit.json", asdict(card))  # compare and report read it
    return card, store.path
