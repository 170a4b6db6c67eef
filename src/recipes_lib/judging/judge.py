"""Asking the judge in both orders, over a store.

Each reply is stored as it arrives, and what is stored is not asked again, so the same command
continues an evaluation that ended early. A malformed verdict is asked again a bounded number of
times with a new seed, and every attempt is stored. A request that failed or was refused is not
stored: it is missing, and the evaluation says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

from recipes_lib.core.errors import ExitCode, RecipesError
from recipes_lib.core.json_files import Row
from recipes_lib.engine import Completion
from recipes_lib.judging.prometheus import (
    CountTokens,
    JudgePrompt,
    Rubric,
    Template,
    build_prompt,
    nonce,
)
from recipes_lib.judging.store import JudgmentStore, judgment_key, text_hash
from recipes_lib.judging.verdicts import Status, Verdict, parse_absolute, parse_relative

# verdicts that need no judge are stored together: syncing each would take longer than finding it
DECIDED_AT_ONCE = 1000
REASK_TEMPERATURE = 0.7


class EvaluationIncomplete(RecipesError):
    """The evaluation ended with judgments missing; the same command continues it."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


@dataclass(frozen=True)
class Item:
    """One answer to grade (absolute), or a candidate's and its opponent's to compare (relative).

    `meta` is stored with each judgment (category, turn, probe).
    """

    question_id: str
    instruction: str
    answer: str
    opponent: str | None = None
    reference: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Whether two answers are compared ("relative") or one is graded ("absolute")."""
        return "absolute" if self.opponent is None else "relative"

    def shown(self, order: str) -> tuple[str, ...]:
        """Return the answers in an order."""
        if self.opponent is None:
            return (self.answer,)
        pair = self.answer, self.opponent
        return pair[::-1] if order == "BA" else pair


@dataclass(frozen=True)
class JudgeRequest:
    """One question to the judge about an item.

    `order` is "AB" when the candidate is Response A, "BA" when it is Response B, and "single" in
    absolute grading. `seed` and `temperature` change with each attempt.
    """

    key: str
    item: Item
    order: str
    prompt: JudgePrompt
    seed: int = 0
    temperature: float = 0.0
    attempt: int = 1

    @property
    def kind(self) -> str:
        """Whether two answers are compared ("relative") or one is graded ("absolute")."""
        return self.item.kind

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers as the prompt shows them."""
        return self.item.shown(self.order)

    @property
    def allowed(self) -> tuple[str, ...]:
        """The verdict tokens, for a judge that reads probabilities."""
        return ("A", "B") if self.kind == "relative" else ("1", "2", "3", "4", "5")


_Asked = tuple[JudgeRequest, list[Row]]  # a request, and its attempts so far


class Judge(Protocol):
    """A judge: a model, a server, or a test's fake."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights (or served model), decoding and verdict mode: it changes whenever the
        same prompt could get another verdict.
        """

    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        """Yield the reply to each request as it arrives, in any order; transport errors are
        replies, not exceptions.

        Args:
            requests: at least one, all of one temperature; taken as there is room for them.
        """


@dataclass(frozen=True, kw_only=True)
class JudgePlan:
    """How to ask: prompt, rubric, budget, re-asks, and when to give up."""

    template: Template
    rubric: Rubric
    seed: int = 0
    max_reasks: int = 2
    max_consecutive_failures: int = 20
    count_tokens: CountTokens | None = None
    max_prompt_tokens: int | None = None
    rules: bool = True  # decide empty and identical answers without the judge

    @property
    def kind(self) -> str:
        """Whether the template compares ("relative") or grades ("absolute")."""
        return "relative" if "{answer_2}" in self.template.user else "absolute"


@dataclass
class Failures:
    """Requests without a reply: by reason, refused by the server as they are, and in a row."""

    reasons: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    in_a_row: int = 0

    def add(self, reason: str, refused: bool) -> None:
        """Count one."""
        self.reasons[reason] += 1
        self.refused += refused
        self.in_a_row += 1

    @property
    def total(self) -> int:
        """All of them."""
        return self.reasons.total()

    def __str__(self) -> str:
        shown = self.reasons.most_common(3)
        more = self.total - sum(count for _, count in shown)
        parts = [f"{reason} ({count} times)" if count > 1 else reason for reason, count in shown]
        return "; ".join([*parts, *([f"{more} other failures"] if more else [])])

    def remedy(self) -> str:
        """Return what to do about them."""
        if self.refused < self.total:
            return "run the same command to continue"
        return (
            "the server refuses them as they are: change the recipe or the server, then run the"
            " same command to ask again"
        )


@dataclass
class JudgeRun:
    """How many judgments were asked and stored, decided by rule, already there, asked again, and
    are missing (failed).
    """

    asked: int = 0
    by_rule: int = 0
    stored_before: int = 0
    reasked: int = 0
    failed: Failures = field(default_factory=Failures)

    def check_complete(self) -> None:
        """Refuse a run with missing judgments.

        Raises:
            EvaluationIncomplete: with each reason and how often it was given.
        """
        if self.failed.total:
            what = f"{self.failed.total} judgments are missing: {self.failed}"
            raise EvaluationIncomplete(what, self.failed.remedy())


def build_requests(
    items: Iterable[Item], plan: JudgePlan, fingerprint: str
) -> Iterator[JudgeRequest]:
    """Yield the requests of each item: both orders of a pair, or the one of a single answer."""
    for item in items:
        if item.kind != plan.kind:
            raise ValueError(
                f"item {item.question_id} does not fit the {plan.kind} prompt {plan.template.name}"
            )
        for order in ("single",) if item.opponent is None else ("AB", "BA"):
            yield make_request(item, order, plan, fingerprint)


def make_request(item: Item, order: str, plan: JudgePlan, fingerprint: str) -> JudgeRequest:
    """Return one request."""
    shown = item.shown(order)
    hashes = list(map(text_hash, shown))
    # what a rule decides is not sent, so its prompt may be too long
    decided = plan.rules and rule_verdict(plan.kind, shown) is not None
    prompt = build_prompt(
        plan.template,
        plan.rubric,
        item.instruction,
        shown,
        item.reference,
        code=nonce(item.question_id, shown, str(plan.seed)),
        count_tokens=None if decided else plan.count_tokens,
        max_tokens=plan.max_prompt_tokens,
    )
    key = judgment_key(item.question_id, order, fingerprint, prompt.hash, hashes)
    return JudgeRequest(key, item, order, prompt, plan.seed)


def rule_verdict(kind: str, answers: Sequence[str]) -> Verdict | None:
    """Return the verdict that needs no judge: an empty answer loses (score 1), identical answers
    tie; None otherwise.
    """
    first, *others = (answer.strip() for answer in answers)
    if kind == "absolute":
        return None if first else Verdict(Status.OK, 1, "empty answer")
    if first == others[0]:
        return Verdict(Status.OK, "tie", "identical answers")
    if not (first and others[0]):
        return Verdict(Status.OK, "A" if first else "B", "empty answer")
    return None


def read_reply(request: JudgeRequest, reply: Completion) -> Verdict:
    """Return the verdict of a reply, from its probabilities where it has them, else from
    its text.
    """
    relative, shares = request.kind == "relative", reply.probabilities
    if shares is None:
        return (parse_relative if relative else parse_absolute)(reply.text, reply.finish_reason)
    if not all(map(math.isfinite, shares.values())):
        return Verdict(Status.UNPARSED, reason="the judge's probabilities are not finite")
    best, second, *_ = sorted(request.allowed, key=lambda token: -shares.get(token, 0.0))
    if shares.get(best, 0.0) <= shares.get(second, 0.0):
        return Verdict(Status.UNPARSED, reason="the two likeliest verdicts are equally likely")
    return Verdict(Status.OK, best if relative else int(best))


def judge_items(
    items: Iterable[Item], judge: Judge, store: JudgmentStore, plan: JudgePlan
) -> JudgeRun:
    """Judge every item as `ask` does."""
    return ask(build_requests(items, plan, judge.fingerprint), judge, store, plan)


def ask(
    requests: Iterable[JudgeRequest],
    judge: Judge,
    store: JudgmentStore,
    plan: JudgePlan,
    progress: Callable[[JudgeRun], None] = lambda run: None,
) -> JudgeRun:
    """Put requests before a judge and store the verdicts; what the store holds is not asked.

    Args:
        progress: called after each reply.

    Raises:
        EvaluationIncomplete: after `max_consecutive_failures` failures in a row.
    """
    run, waiting = JudgeRun(), dict[str, _Asked]()
    decided: list[Row] = []  # verdicts that need no judge, until they are stored with the next one
    source = _to_ask(requests, waiting, decided, store, plan, judge.fingerprint, run)
    while first := next(source, None):
        again: list[_Asked] = []
        with closing(judge.complete(chain([first], source))) as replies:
            for reply in replies:
                request, attempts = waiting.pop(reply.key)
                if reply.error is not None:
                    run.failed.add(reply.error, reply.refused)
                    if run.failed.in_a_row >= plan.max_consecutive_failures:
                        store.append_all(decided)
                        raise EvaluationIncomplete(
                            f"the judge failed {run.failed.in_a_row} times in a row: {run.failed}",
                            f"{len(store)} judgments are stored; {run.failed.remedy()}",
                            file=store.path,
                        )
                    continue
                run.failed.in_a_row = 0
                verdict = read_reply(request, reply)
                malformed = verdict.status in (Status.UNPARSED, Status.EMPTY)
                if malformed and reply.probabilities is None and request.attempt <= plan.max_reasks:
                    status = verdict.status.value
                    attempt = {"seed": request.seed, "status": status, "raw": reply.text}
                    # a new seed, at a temperature where the seed matters
                    seeded = text_hash(f"{request.seed}:{request.attempt}:{reply.key}")
                    new = replace(
                        request,
                        seed=int(seeded[:8], 16),
                        temperature=REASK_TEMPERATURE,
                        attempt=request.attempt + 1,
                    )
                    again.append((new, [*attempts, attempt]))
                    run.reasked += 1
                else:
                    row = _row(request, verdict, judge.fingerprint, "judge", reply, attempts)
                    run.asked += 1
                    store.append_all([*decided, row])
                    decided.clear()
                progress(run)
        if waiting:
            raise ValueError(f"the judge left {len(waiting)} requests without a reply")
        source = _again(again, waiting)
    store.append_all(decided)
    progress(run)
    return run


def _again(asked: Sequence[_Asked], waiting: dict[str, _Asked]) -> Iterator[JudgeRequest]:
    """Yield the requests of those that are asked again, put among the waiting."""
    for request, attempts in asked:
        waiting[request.key] = request, attempts
        yield request


def _to_ask(
    requests: Iterable[JudgeRequest],
    waiting: dict[str, _Asked],
    decided: list[Row],
    store: JudgmentStore,
    plan: JudgePlan,
    fingerprint: str,
    run: JudgeRun,
) -> Iterator[JudgeRequest]:
    """Yield the requests for the judge, put among the waiting; others are counted, or decided on
    the way.
    """
    for request in requests:
        if request.key in store or request.key in waiting:
            run.stored_before += 1
        elif plan.rules and (verdict := rule_verdict(request.kind, request.answers)):
            decided.append(_row(request, verdict, fingerprint, "rule"))
            run.by_rule += 1
        elif not request.prompt.fits:
            reason = "the prompt does not fit the judge, even with its answers cut"
            verdict = Verdict(Status.TRUNCATED, reason=reason)
            decided.append(_row(request, verdict, fingerprint, "limit"))
            run.asked += 1
        else:
            waiting[request.key] = request, []
            yield request
        if len(decided) == DECIDED_AT_ONCE:
            store.append_all(decided)
            decided.clear()


def _row(
    request: JudgeRequest,
    verdict: Verdict,
    fingerprint: str,
    source: str,
    reply: Completion | None = None,
    attempts: Sequence[Row] = (),
) -> Row:
    """The stored line. `lengths` are characters of the answers in the prompt's order."""
    row = {
        "key": request.key,
        "kind": request.kind,
        "question_id": str(request.item.question_id),
        "order": request.order,
        "status": verdict.status.value,
        "value": verdict.value,
        "reason": verdict.reason,
        "source": source,
        "judge": fingerprint,
        "prompt_hash": request.prompt.hash,
        "answer_hashes": list(map(text_hash, request.answers)),
        "lengths": list(map(len, request.answers)),
        "marker_in_answer": request.prompt.marker_in_answer,
        "cut": request.prompt.cut,
        "seed": request.seed,
        "temperature": request.temperature,
        "attempts": list(attempts),
        "meta": dict(request.item.meta),
    }
    if reply is not None:
        shares = reply.probabilities
        row |= {"raw": reply.text if shares is None else None, "finish_reason": reply.finish_reason}
        if shares is not None:
            finite = {token: share for token, share in shares.items() if math.isfinite(share)}
            mass = sum(finite.get(token, 0.0) for token in request.allowed)
            row |= {"probabilities": finite, "mass": mass}
    return row
