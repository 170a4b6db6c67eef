"""What the suites share that a judge decides: answers of all models first, then one judge for all
of them, its audit with two probes, and the logs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from recipes_lib.core.errors import RecipeError
from recipes_lib.core.files import Row
from recipes_lib.core.lock import waiting_lock
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.audit import audit, audit_banner, audit_note, probe_items
from recipes_lib.evals.judge import Item, JudgePlan, ask, build_requests
from recipes_lib.evals.judges import Judge
from recipes_lib.evals.log import REFERENCE, EvalLog, Metric, Scorecard, log_file
from recipes_lib.evals.outcomes import percent
from recipes_lib.evals.questions import QuestionSet, pair_texts
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.evals.store import Store

_SAME_ANSWERS = "{} and {} gave the same answers: they are one model here and cannot be ranked"


@dataclass(frozen=True)
class ToJudge:
    """Items that are judged alike, and the name that is shown with the progress."""

    items: Sequence[Item]
    plan: JudgePlan
    name: str


@dataclass
class Judged:
    """One model's answers, its opponent's, and what the judge said about them."""

    answers: Answers
    opponent: Answers | None
    rows: list[Row] = field(default_factory=list)
    card: Scorecard = field(default_factory=Scorecard)


class JudgedSuite:
    """A suite that a judge decides. A suite says what is to be judged (`to_judge`, `pair_items`)
    and what the verdicts mean (`metrics`, `table`).
    """

    title = ""

    def __init__(self, recipe: EvalRecipe, chosen: QuestionSet) -> None:
        self.recipe, self.chosen = recipe, chosen

    def pair_items(self, answers: Answers, opponent: Answers) -> list[Item]:
        """Return what is to be compared."""
        raise NotImplementedError

    def to_judge(
        self, answers: Answers, opponent: Answers | None, judge: Judge
    ) -> Iterator[ToJudge]:
        """Yield what the judge is asked about one model's answers."""
        raise NotImplementedError

    def metrics(self, judged: Judged) -> list[Metric]:
        """Return the metrics of one model, and write what other programs read."""
        raise NotImplementedError

    def name_of(self, metric: str) -> str:
        """Return what a metric is called: after the suite where the questions are the published
        ones, else after the eval.
        """
        if self.chosen.published:
            return f"{self.title} {metric}"
        return f"{metric} on {self.recipe.name}"


def judge_all(
    suite: JudgedSuite, pairs: Sequence[tuple[Answers, Answers | None]], judge: Judge
) -> list[Judged]:
    """Have a judge give every verdict that is missing, and audit it on them.

    Raises:
        EvaluationIncomplete: judgments are missing; the same command continues.
    """
    recipe, found = suite.recipe, []
    probes: list[Row] = []
    for answers, opponent in pairs:
        judged = Judged(answers, opponent)
        folder = answers.folder(recipe.name)
        with waiting_lock(folder):
            store = Store(judgments_file(folder, opponent.name if opponent else REFERENCE))
            for part in suite.to_judge(answers, opponent, judge):
                judged.rows += ask_all(part.items, judge, part.plan, store, part.name)
            if opponent is not None and not probes and recipe.metrics.probe_pairs:
                items = suite.pair_items(answers, opponent)
                plan = replace(judge.plan("relative"), rules=False)
                chosen = list(probe_items(items, recipe.metrics.probe_pairs))
                probes = ask_all(chosen, judge, plan, store, "probes")
        found.append(judged)
    for judged in found:
        labels = labels_of(judged, suite)
        limits = judge.file.thresholds
        judged.card = audit([*judged.rows, *probes], limits, labels)
    return found


def ask_all(
    items: Sequence[Item], judge: Judge, plan: JudgePlan, store: Store, name: str
) -> list[Row]:
    """Ask what is missing, with a progress bar, and return all rows of these items.

    Raises:
        EvaluationIncomplete: judgments are missing; the same command continues.
    """
    keys = [request.key for request in build_requests(items, plan, judge.fingerprint)]
    missing = sum(key not in store for key in keys)
    with tqdm(total=missing, desc=f"judgments {name}", unit="", disable=not missing) as bar:
        ask(items, judge, store, plan, bar.update).check_complete()
    return [row for key in keys if (row := store.get(key))]


def judgments_file(folder: Path, against: str) -> Path:
    """Return the file of judgments against one opponent."""
    suffix = "" if against == REFERENCE else f".against-{against}"
    return folder / f"judgments{suffix}.jsonl"


def labels_of(judged: Judged, suite: JudgedSuite) -> dict[str, str]:
    """Return what people said of these pairs, by the id of the item."""
    labels, opponent = suite.chosen.labels, judged.opponent
    if not labels or opponent is None:
        return {}
    turned = {"win": "loss", "loss": "win", "tie": "tie"}
    found = {}
    for item in suite.pair_items(judged.answers, opponent):
        texts = pair_texts(item.instruction, item.answer, str(item.opponent))
        other = (texts[0], texts[2], texts[1])
        if label := labels.get(texts):
            found[item.question_id] = label
        elif label := labels.get(other):
            found[item.question_id] = turned[label]
    return found


def check_formats(pairs: Iterable[tuple[Answers, Answers | None]]) -> None:
    """Refuse to compare models that were asked in different prompt formats.

    Raises:
        RecipeError: naming the formats.
    """
    for answers, opponent in pairs:
        one, other = answers.facts, opponent.facts if opponent else answers.facts
        known = one.prompt_format_hash and other.prompt_format_hash
        if known and one.prompt_format_hash != other.prompt_format_hash:
            raise RecipeError(
                f"{one.name} is asked in prompt format {one.prompt_format}, {other.name} in"
                f" {other.prompt_format}",
                "the difference would be part of the result; insist with --allow-format-differences"
                " (recorded)",
            )


def log_of(
    suite: JudgedSuite, judged: Judged, everyone: Sequence[Judged], judge: Judge, key: str
) -> EvalLog:
    """Return one model's log."""
    recipe, chosen = suite.recipe, suite.chosen
    answers = judged.answers.with_faults()
    opponent = judged.opponent.with_faults() if judged.opponent else None
    assert answers.run is not None
    against = opponent.name if opponent else None
    same = [
        other.answers.name
        for other in everyone
        if other is not judged and other.answers.digest == answers.digest
    ]
    if opponent is not None and opponent.digest == answers.digest:
        same.insert(0, opponent.name)
    models = [*answers.facts.models, *(opponent.facts.models if opponent else ())]
    banners = [
        f"Weak judge: {judge.section.weak}." if judge.section.weak else None,
        audit_banner(judged.card),
        self_judged(judge.section.model, models),
        *answer_banners(answers, recipe.metrics.max_identical_fraction),
        chosen.subset,
        *(_SAME_ANSWERS.format(answers.name, other) for other in same[:1]),
    ]
    notes = [audit_note(judged.card)]
    if recipe.suite.name == "mt_bench" and (missing := chosen.without_reference):
        notes.append(
            f"{len(missing)} questions need a reference answer and have none, so they are graded"
            f" without: {', '.join(missing[:8])}"
        )
    return EvalLog(
        suite=recipe.suite.name,
        eval=recipe.name,
        target=answers.name,
        against=against,
        key=key,
        n=len(chosen.questions),
        subset=chosen.subset,
        banners=tuple(line for line in banners if line),
        notes=tuple(line for line in notes if line),
        metrics=tuple(suite.metrics(judged)),
        answers=answers.facts,
        opponent=opponent.facts if opponent else None,
        judge=judge.facts(),
        audit=judged.card,
        file=log_file(answers.run.path, recipe.name, against),
    )


def self_judged(judge_model: str, candidates: Sequence[str]) -> str | None:
    """Return a warning if the judge grades its own answers, else None.

    Args:
        judge_model: model id or path of the judge.
        candidates: model ids, base models included: a model fine-tuned from the judge counts too.
    """
    judge = judge_model.rstrip("/").lower()
    same = [name for name in candidates if name.rstrip("/").lower() == judge]
    return f"{same[0]} judges its own answers: expect self-preference" if same else None


def answer_banners(answers: Answers, max_identical_fraction: float) -> list[str]:
    """Return the lines about the answers themselves: one answer for many questions, cut, empty and
    looping ones.
    """
    faults = answers.facts.faults
    assert faults is not None
    lines = []
    if faults.identical > max(2, max_identical_fraction * faults.n):
        lines.append(f"{faults.identical} of {faults.n} prompts got one and the same answer")
    for count, text in (
        (faults.empty, "are empty"),
        (faults.cut or 0, "reached max_new_tokens and are cut"),
        (faults.loops, "end in a loop, one phrase three times"),
    ):
        if count > 0.1 * faults.n:
            lines.append(f"{count} of {faults.n} answers {text}")
    return lines


def footer(logs: Sequence[EvalLog]) -> list[str]:
    """Return the lines below a judged suite's table: about the judge, then about the answers."""
    return [*map(_judge_line, logs), *map(_answer_line, logs)]


def _judge_line(log: EvalLog) -> str:
    card = log.audit
    assert card is not None
    measured = [
        f"{one.check} {percent(one.value)}" for one in card.checks[:3] if one.value is not None
    ]
    results = [one.result for one in card.checks if one.needs]
    states = (
        f"{results.count('pass')} pass, {results.count('fail')} fail,"
        f" {results.count('not measured')} not measured"
    )
    return f"judge on {log.target}: {', '.join([*measured, f'audit {states}'])}"


def _answer_line(log: EvalLog) -> str:
    faults, facts = log.answers.faults, log.answers
    assert faults is not None
    looping = f", {faults.loops} in a loop" if faults.loops else ""
    speed = f", {facts.new_tokens / facts.seconds:.0f} tokens/s" if facts.seconds else ""
    return (
        f"answers of {log.target}: {faults.n}, {faults.empty} empty, {faults.cut} cut,"
        f" {faults.identical} identical{looping}{speed}"
    )
