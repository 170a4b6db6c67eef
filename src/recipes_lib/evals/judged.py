"""What the suites share that a judge decides: its verdicts, its audit with two probes, the logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes_lib.core.files import Row
from recipes_lib.core.lock import waiting_lock
from recipes_lib.core.terminal import count
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.audit import audit, audit_banner, audit_note, probe_items
from recipes_lib.evals.judge import Item, Judge, ask
from recipes_lib.evals.log import EvalLog, Metric, Sample, Store, log_file
from recipes_lib.evals.questions import TURNED, Question, pair_texts
from recipes_lib.evals.suites import Suite
from recipes_lib.evals.verdicts import metric_of, sample_of


@dataclass
class Judged:
    """One model's answers, its opponent's, and what the judge said about them."""

    answers: Answers
    opponent: Answers | None
    compared: Sequence[Item] = ()
    graded: Sequence[Item] = ()
    rows: list[Row] = field(default_factory=list)

    def samples(self, items: Sequence[Item]) -> list[Sample]:
        """Return what was compared, or graded, as samples."""
        by_item: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in self.rows:
            by_item[row["question_id"]][row["order"]] = row
        samples = []
        for item in items:
            question = item.question
            assert question is not None
            place = question.id, item.turn, item.draw
            opponent = self.opponent if item.opponent is not None else None
            texts = [side.text(*place) for side in (self.answers, opponent) if side]
            known: dict[str, Any] = {
                "turn": item.turn,
                "draw": item.draw,
                "category": question.category or "all",
                "input": question.turns[item.turn - 1],
                "answer": texts[0],
                "opponent": texts[1] if opponent else None,
                "lengths": tuple(map(len, texts)),
                "cut": self.answers.is_cut(*place),
            }
            samples.append(sample_of(question.id, by_item[item.name], item.orders, **known))
        return samples


class JudgedSuite(Suite):
    """A suite that a judge decides: it says how the judge is asked about an answer."""

    metric_order: tuple[str, ...] = ("win_rate", "grade")
    graded_by_reference = False  # by the rubric for references, where a question has one
    always_graded = False  # whatever `metrics.absolute` says

    def item(
        self, question: Question, turn: int, draw: int, answers: Answers, opponent: Answers | None
    ) -> Item:
        """Return what the judge is asked: to grade an answer, or to compare it with another."""
        raise NotImplementedError

    def items(self, answers: Answers, opponent: Answers | None = None) -> list[Item]:
        """Return what the judge is asked about all answers."""
        return [
            self.item(question, turn, draw, answers, opponent)
            for draw in range(1, answers.draws + 1)
            for question in self.chosen.questions
            for turn in range(1, len(question.turns) + 1)
        ]

    def metrics(self, judged: Judged) -> list[Metric]:
        """Return the metrics of one model."""
        named = f"{self.title} {{}}" if self.chosen.published else f"{{}} on {self.recipe.name}"
        metrics = {}
        if judged.compared and judged.opponent:
            samples = judged.samples(judged.compared)
            label, opponent = named.format("win rate"), judged.opponent.name
            metrics["win_rate"] = metric_of("win_rate", label, samples, opponent=opponent)
        if judged.graded:
            samples = judged.samples(judged.graded)
            metrics["grade"] = metric_of("grade", named.format("mean grade, 1-5"), samples, "grade")
        return [metrics[name] for name in self.metric_order if name in metrics]


def judge_models(
    suite: JudgedSuite, pairs: Sequence[tuple[Answers, Answers | None]], judge: Judge
) -> list[EvalLog]:
    """Have a judge give every verdict that is missing, audit it on them, and return the logs.

    Args:
        pairs: the answers of each model, and of its opponent where it has one.
    """
    recipe = suite.recipe
    everyone: list[Judged] = []
    probes: list[Row] = []
    for answers, opponent in pairs:
        judged = Judged(answers, opponent)
        everyone.append(judged)
        if suite.always_graded or recipe.metrics.absolute:
            judged.graded = suite.items(answers)
        if opponent is not None:
            judged.compared = suite.items(answers, opponent)
        folder, name = answers.folder(recipe.name), answers.name
        with waiting_lock(folder):
            against = f".against-{opponent.name}" if opponent and opponent.run else ""
            store = Store(folder / f"judgments{against}.jsonl")
            by_reference = suite.graded_by_reference
            judged.rows += ask(
                judged.graded, judge, store, f"{name} (1-5)", by_reference=by_reference
            )
            judged.rows += ask(judged.compared, judge, store, name)
            # the judge is probed once, with the answers of the first model
            probed = [] if probes else [*probe_items(judged.compared, recipe.metrics.probe_pairs)]
            if probed:
                probes = [*judged.rows, *ask(probed, judge, store, "probes", rules=False)]
    return [_log_of(suite, judged, everyone, probes, judge) for judged in everyone]


def _log_of(
    suite: JudgedSuite,
    judged: Judged,
    everyone: Sequence[Judged],
    probes: Sequence[Row],
    judge: Judge,
) -> EvalLog:
    """The log of one model."""
    recipe, chosen = suite.recipe, suite.chosen
    answers, opponent, facts = judged.answers, judged.opponent, judged.answers.facts
    assert answers.run is not None
    labels: dict[str, str] = {}  # what people said of these pairs, by the name of the item
    for item in judged.compared if chosen.labels else ():
        texts = pair_texts(item.instruction, item.answer, str(item.opponent))
        turned = chosen.labels.get((texts[0], texts[2], texts[1]), "")
        if label := chosen.labels.get(texts) or TURNED.get(turned):
            labels[item.name] = label
    card = audit(judged.rows, recipe.thresholds, labels, probes)
    banners = [f"Weak judge: {judge.section.weak}."] if judge.section.weak else []
    banners += filter(None, [audit_banner(card)])
    # bases included: a model that was fine-tuned from the judge counts too
    if judge.section.model in (*facts.models, *(opponent.facts.models if opponent else ())):
        banners.append(f"{judge.section.model} judges its own answers: expect self-preference")
    others = [opponent, *(each.answers for each in everyone if each is not judged)]
    same = [other.name for other in others if other and other.digest == answers.digest]
    if same:
        banners.append(
            f"{answers.name} and {same[0]} gave the same answers: they are one model here and"
            " cannot be ranked"
        )
    notes = [*filter(None, [audit_note(card)])]
    if suite.graded_by_reference and (missing := chosen.without_reference):
        num = count(len(missing), "question")
        notes.append(f"{num} graded without the reference needed: {', '.join(missing[:8])}")
    if opponent and opponent.facts.prompt_format_hash not in (None, facts.prompt_format_hash):
        asked = f"{answers.name} in {facts.prompt_format}, {opponent.name} in"
        notes.append(f"other prompt formats: {asked} {opponent.facts.prompt_format}")
    against = opponent.name if opponent else None
    return EvalLog(
        suite=recipe.suite.name,
        eval=recipe.name,
        target=answers.name,
        against=against,
        n=len(chosen.questions),
        subset=chosen.subset,
        banners=tuple(banners),
        notes=tuple(notes),
        metrics=tuple(suite.metrics(judged)),
        answers=facts,
        opponent=opponent.facts if opponent else None,
        judge=judge.facts(),
        audit=card,
        file=log_file(answers.run.path, recipe.name, against),
    )
