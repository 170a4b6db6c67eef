"""Asking a judge in both orders, over a store.

Each reply is stored as it arrives, and what is stored is not asked again, so the same command
continues an evaluation that ended early. A malformed verdict is asked again a bounded number of
times with a new seed, and every attempt is stored. A request that failed or was refused is not
stored: it is missing, and the evaluation says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

from recipes_lib.core.files import Row
from recipes_lib.evals.engine import Completion, EvaluationIncomplete, Failures
from recipes_lib.evals.prompts import (
    CountTokens,
    JudgePrompt,
    Rubric,
    Template,
    build_prompt,
    fence_code,
)
from recipes_lib.evals.store import Store, text_hash
from recipes_lib.evals.verdicts import (
    JudgeVerdict,
    Status,
    parse_absolute,
    parse_json,
    parse_relative,
)

# verdicts that need no judge are stored together: syncing each takes longer than finding it
DECIDED_AT_ONCE = 1000
REASK_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Item:
    """One answer to grade (absolute), or a candidate's and its opponent's to compare (relative).

    `meta` is stored with each judgment (category, probe).
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
    def answers(self) -> tuple[str, ...]:
        """The answers as the prompt shows them."""
        return self.item.shown(self.order)

    @property
    def allowed(self) -> tuple[str, ...]:
        """The verdicts that there are."""
        return ("A", "B") if self.item.kind == "relative" else ("1", "2", "3", "4", "5")


class AsksJudge(Protocol):
    """A judge: a model, a server, or a test's fake."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights (or served model), decoding and verdict mode."""

    def complete(self, requests: Iterable[JudgeRequest]) -> Iterator[Completion]:
        """Yield the reply to each request as it arrives, in any order; errors are replies.

        Args:
            requests: at least one, all of one temperature; taken as there is room for them.
        """


@dataclass(frozen=True, kw_only=True)
class JudgePlan:
    """How to ask: prompt, rubric, budget, re-asks, and when to give up.

    `rules` decides empty and identical answers without the judge; `mode` says how a text is read.
    """

    template: Template
    rubric: Rubric
    seed: int = 0
    mode: str = "generate"
    max_reasks: int = 2
    max_consecutive_failures: int = 20
    count_tokens: CountTokens | None = None
    max_prompt_tokens: int | None = None
    rules: bool = True

    @property
    def kind(self) -> str:
        """Whether the template compares ("relative") or grades ("absolute")."""
        return "relative" if "{answer_2}" in self.template.user else "absolute"


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


def judgment_key(
    question_id: str, order: str, judge: str, prompt_hash: str, answer_hashes: Sequence[str]
) -> str:
    """Return the key of a judgment.

    Args:
        order: as in `JudgeRequest`.
        judge: its fingerprint.
        prompt_hash: of the prompt as sent.
        answer_hashes: of the answers before they are cut, in the prompt's order.
    """
    return text_hash(json.dumps([question_id, order, judge, prompt_hash, list(answer_hashes)]))


def build_requests(
    items: Iterable[Item], plan: JudgePlan, fingerprint: str
) -> Iterator[JudgeRequest]:
    """Yield the requests of each item: both orders of a pair, or the one of a single answer."""
    for item in items:
        for order in ("single",) if item.opponent is None else ("AB", "BA"):
            yield _request(item, order, plan, fingerprint)


def _request(item: Item, order: str, plan: JudgePlan, fingerprint: str) -> JudgeRequest:
    """Return one request."""
    shown = item.shown(order)
    # what a rule decides is not sent, so its prompt may be too long
    decided = plan.rules and rule_verdict(shown) is not None
    prompt = build_prompt(
        plan.template,
        plan.rubric,
        item.instruction,
        shown,
        item.reference,
        code=fence_code(item.question_id, shown, str(plan.seed)),
        count_tokens=None if decided else plan.count_tokens,
        max_tokens=plan.max_prompt_tokens,
    )
    hashes = list(map(text_hash, shown))
    key = judgment_key(item.question_id, order, fingerprint, prompt.hash, hashes)
    return JudgeRequest(key, item, order, prompt, plan.seed)


def rule_verdict(answers: Sequence[str]) -> JudgeVerdict | None:
    """Return the verdict that needs no judge: an empty answer loses (grade 1), identical answers
    tie; None otherwise.
    """
    first, *others = (answer.strip() for answer in answers)
    if not others:
        return None if first else JudgeVerdict(Status.OK, 1, "empty answer")
    if first == others[0]:
        return JudgeVerdict(Status.OK, "tie", "identical answers")
    if not (first and others[0]):
        return JudgeVerdict(Status.OK, "A" if first else "B", "empty answer")
    return None


def read_reply(request: JudgeRequest, reply: Completion, mode: str = "generate") -> JudgeVerdict:
    """Return the verdict of a reply, from its probabilities where it has them, else from its
    text.
    """
    relative, shares = request.item.kind == "relative", reply.probabilities
    if shares is None and mode == "json":
        return parse_json(reply.text, request.allowed, reply.finish_reason)
    if shares is None:
        return (parse_relative if relative else parse_absolute)(reply.text, reply.finish_reason)
    if not all(map(math.isfinite, shares.values())):
        return JudgeVerdict(Status.UNPARSED, reason="the judge's probabilities are not finite")
    best, second, *_ = sorted(request.allowed, key=lambda token: -shares.get(token, 0.0))
    if shares.get(best, 0.0) <= shares.get(second, 0.0):
        return JudgeVerdict(Status.UNPARSED, reason="the two likeliest verdicts are equally likely")
    return JudgeVerdict(Status.OK, best if relative else int(best))


_Waiting = dict[str, tuple[JudgeRequest, list[Row]]]  # a request, and its attempts so far


def ask(
    items: Iterable[Item],
    judge: AsksJudge,
    store: Store,
    plan: JudgePlan,
    progress: Callable[[int], None] = lambda number: None,
) -> JudgeRun:
    """Have items judged and store the verdicts; what the store holds is not asked.

    Args:
        progress: is called with the number of verdicts that were added.

    Raises:
        EvaluationIncomplete: after `max_consecutive_failures` failures in a row.
    """
    run, waiting = JudgeRun(), _Waiting()
    decided: list[Row] = []  # verdicts that need no judge, until they are stored with the next one
    requests = build_requests(items, plan, judge.fingerprint)
    source = _to_ask(requests, waiting, decided, store, plan, judge.fingerprint, run)
    while first := next(source, None):
        again: _Waiting = {}
        with closing(judge.complete(chain([first], source))) as replies:  # type: ignore[type-var]
            for reply in replies:
                request, attempts = waiting.pop(reply.key)
                run.failed.add(reply)
                if run.failed.in_a_row >= plan.max_consecutive_failures:
                    store.append(decided)
                    what = f"the judge failed {run.failed.in_a_row} times in a row: {run.failed}"
                    hint = f"{len(store)} judgments are stored; {run.failed.remedy()}"
                    raise EvaluationIncomplete(what, hint, file=store.path)
                if reply.error is not None:
                    continue
                verdict = read_reply(request, reply, plan.mode)
                malformed = verdict.status in (Status.UNPARSED, Status.EMPTY)
                if malformed and reply.probabilities is None and request.attempt <= plan.max_reasks:
                    again[request.key] = _with_new_seed(request, attempts, verdict, reply)
                    run.reasked += 1
                    continue
                row = _row(request, verdict, judge.fingerprint, "judge", reply, attempts)
                run.asked += 1
                store.append([*decided, row])
                progress(1 + len(decided))
                decided.clear()
        if waiting:
            raise ValueError(f"the judge left {len(waiting)} requests without a reply")
        waiting.update(again)
        source = iter([request for request, _ in again.values()])
    store.append(decided)
    progress(len(decided))
    return run


def _with_new_seed(
    request: JudgeRequest, attempts: Sequence[Row], verdict: JudgeVerdict, reply: Completion
) -> tuple[JudgeRequest, list[Row]]:
    """Return a request to be asked again, at a temperature where the seed matters."""
    attempt = {"seed": request.seed, "status": verdict.status.value, "raw": reply.text}
    seed = int(text_hash(f"{request.seed}:{request.attempt}:{request.key}")[:8], 16)
    new = replace(request, seed=seed, temperature=REASK_TEMPERATURE, attempt=request.attempt + 1)
    return new, [*attempts, attempt]


def _to_ask(
    requests: Iterable[JudgeRequest],
    waiting: _Waiting,
    decided: list[Row],
    store: Store,
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
        elif plan.rules and (verdict := rule_verdict(request.answers)):
            decided.append(_row(request, verdict, fingerprint, "rule"))
            run.by_rule += 1
        elif not request.prompt.fits:
            reason = "the prompt does not fit the judge, even with its answers cut"
            verdict = JudgeVerdict(Status.TRUNCATED, reason=reason)
            decided.append(_row(request, verdict, fingerprint, "limit"))
            run.asked += 1
        else:
            waiting[request.key] = request, []
            yield request
        if len(decided) == DECIDED_AT_ONCE:
            store.append(decided)
            decided.clear()


def _row(
    request: JudgeRequest,
    verdict: JudgeVerdict,
    fingerprint: str,
    source: str,
    reply: Completion | None = None,
    attempts: Sequence[Row] = (),
) -> Row:
    """The stored line. `lengths` are characters of the answers in the prompt's order."""
    row = {
        "key": request.key,
        "kind": request.item.kind,
        "question_id": request.item.question_id,
        "order": request.order,
        "status": verdict.status.value,
        "value": verdict.value,
        "reason": verdict.reason,
        "source": source,
        "judge": fingerprint,
        "prompt_hash": request.prompt.hash,
        "answer_hashes": list(map(text_hash, request.answers)),
        "lengths": list(map(len, request.answers)),
        "cut": request.prompt.cut,
        "seed": request.seed,
        "temperature": request.temperature,
        "attempts": list(attempts),
        "meta": dict(request.item.meta),
    }
    if reply is None:
        return row
    row["finish_reason"] = reply.finish_reason
    if reply.probabilities is None:
        return row | {"raw": reply.text}
    finite = {token: one for token, one in reply.probabilities.items() if math.isfinite(one)}
    mass = sum(finite.get(token, 0.0) for token in request.allowed)
    return row | {"raw": None, "probabilities": finite, "mass": mass}
