"""Asking the judge: the protocol that every judge answers to, and the loop that asks in both orders
over a store.

A judge is anything with a `fingerprint` and `complete(requests)`; models, servers and the fakes of
the tests are all that. Each reply is stored as it arrives. What has been stored is not asked again,
so the same command continues an evaluation that ended early. A malformed verdict is asked again a
bounded number of times with a new seed, and every attempt is stored. Only a reply of the judge is a
verdict: a request that failed or was refused is not stored. It is missing, and the evaluation says
so.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from recipes_lib.core.errors import ExitCode, RecipesError
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
ALLOWED = {"relative": ("A", "B"), "absolute": ("1", "2", "3", "4", "5")}


class EvaluationIncomplete(RecipesError):
    """The evaluation ended with judgments missing; the same command continues it."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


@dataclass(frozen=True)
class Item:
    """What is to be judged: one answer (absolute), or the candidate's and its opponent's
    (relative).

    `meta` is stored with each judgment as it is (category, turn, probe).
    """

    question_id: str
    instruction: str
    answer: str
    opponent: str | None = None
    reference: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgeRequest:
    """One question to the judge.

    `order` is "AB" when the candidate is Response A, "BA" when it is Response B, and "single" in
    absolute grading. `allowed` are the verdict tokens for a judge that reads probabilities. `seed`
    and `temperature` change with each attempt.
    """

    key: str
    kind: str
    question_id: str
    order: str
    prompt: JudgePrompt
    answers: tuple[str, ...]
    allowed: tuple[str, ...]
    meta: Mapping[str, Any]
    seed: int = 0
    temperature: float = 0.0
    attempt: int = 1


@dataclass(frozen=True)
class JudgeReply:
    """What came back: text, or probabilities of the allowed tokens, or an error.

    Args:
        text: what the judge wrote after the prompt.
        finish_reason: "stop", or "length" when it was cut off.
        probabilities: next-token probability of each allowed token (not normalised: their sum is
            the mass).
        error: why there is no reply; None if there is one. Such a judgment is missing, and is asked
            again by the next run.
        refused: the server refused the request as it is, so that something has to be changed before
            it can be answered.
    """

    text: str | None = None
    finish_reason: str | None = "stop"
    probabilities: Mapping[str, float] | None = None
    error: str | None = None
    refused: bool = False


class Judge(Protocol):
    """A judge. `fingerprint` names weights (or served model), decoding settings and
    verdict mode.
    """

    @property
    def fingerprint(self) -> str:
        """Hash that changes whenever the same prompt could get another verdict."""

    def complete(self, requests: Sequence[JudgeRequest]) -> Generator[tuple[str, JudgeReply]]:
        """Yield each request's key with its reply as it arrives, in any order; transport errors are
        replies, not exceptions.
        """


@dataclass(frozen=True, kw_only=True)
class JudgePlan:
    """How to ask: prompt, rubric, budget, re-asks, and when to give up."""

    template: Template
    rubric: Rubric
    seed: int = 0
    max_reasks: int = 2
    reask_temperature: float = 0.7
    max_consecutive_failures: int = 20
    batch_size: int = 32
    count_tokens: CountTokens | None = None
    max_prompt_tokens: int | None = None
    rules: bool = True  # decide empty and identical answers without the judge

    @property
    def kind(self) -> str:
        """Whether the template compares ("relative") or grades ("absolute")."""
        return "relative" if "{answer_2}" in self.template.user else "absolute"


@dataclass
class Failures:
    """Requests without a reply: how often each reason was given, how many the server refused as
    they are, how many came in a row.
    """

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
        """How many there were."""
        return self.reasons.total()

    def __str__(self) -> str:
        shown = self.reasons.most_common(3)
        more = self.total - sum(count for _, count in shown)
        parts = [f"{reason} ({count} times)" if count > 1 else reason for reason, count in shown]
        return "; ".join([*parts, *([f"{more} other failures"] if more else [])])

    def remedy(self) -> str:
        """Return what to do about them."""
        if self.refused == self.total:
            return (
                "the server refuses them as they are: change the recipe or the server, then run the"
                " same command to ask again"
            )
        return "run the same command to continue"


@dataclass
class JudgeRun:
    """What a run did: judgments asked and stored, decided by rule, already there, re-asked, and
    failed (missing).
    """

    asked: int = 0
    by_rule: int = 0
    stored_before: int = 0
    reasked: int = 0
    failed: Failures = field(default_factory=Failures)

    def check_complete(self) -> None:
        """Raise if a judgment is missing.

        Raises:
            EvaluationIncomplete: with each reason and how often it was given.
        """
        if self.failed.total:
            raise EvaluationIncomplete(
                f"{self.failed.total} judgments are missing: {self.failed}", self.failed.remedy()
            )


def build_requests(
    items: Iterable[Item], plan: JudgePlan, fingerprint: str
) -> Iterator[JudgeRequest]:
    """Yield the requests of each item: both orders of a pair, or the one of a single answer."""
    for item in items:
        if (item.opponent is None) != (plan.kind == "absolute"):
            raise ValueError(
                f"item {item.question_id} does not fit the {plan.kind} prompt {plan.template.name}"
            )
        answers = (item.answer,) if item.opponent is None else (item.answer, item.opponent)
        code = nonce(item.question_id, answers, str(plan.seed))
        for order in ("single",) if item.opponent is None else ("AB", "BA"):
            shown = tuple(reversed(answers)) if order == "BA" else answers
            yield make_request(item, order, shown, plan, fingerprint, code)


def make_request(
    item: Item, order: str, shown: Sequence[str], plan: JudgePlan, fingerprint: str, code: str
) -> JudgeRequest:
    """Return one request for answers in the prompt's order."""
    decided = (
        plan.rules and rule_verdict(plan.kind, shown) is not None
    )  # such a prompt is not sent, so it needs not fit
    prompt = build_prompt(
        plan.template,
        plan.rubric,
        item.instruction,
        shown,
        item.reference,
        code=code,
        count_tokens=None if decided else plan.count_tokens,
        max_tokens=plan.max_prompt_tokens,
    )
    key = judgment_key(
        item.question_id, order, fingerprint, prompt.hash, [text_hash(answer) for answer in shown]
    )
    return JudgeRequest(
        key,
        plan.kind,
        str(item.question_id),
        order,
        prompt,
        tuple(shown),
        ALLOWED[plan.kind],
        item.meta,
        seed=plan.seed,
    )


def rule_verdict(kind: str, answers: Sequence[str]) -> Verdict | None:
    """Return the verdict that needs no judge: an empty answer loses (score 1), identical answers
    tie; None otherwise.
    """
    empty = [not answer.strip() for answer in answers]
    if kind == "absolute":
        return Verdict(Status.OK, 1, "empty answer") if empty[0] else None
    if answers[0].strip() == answers[1].strip():
        return Verdict(Status.OK, "tie", "identical answers")
    if any(empty):
        return Verdict(Status.OK, "B" if empty[0] else "A", "empty answer")
    return None


def read_reply(request: JudgeRequest, reply: JudgeReply) -> Verdict:
    """Return the verdict of a reply, from its probabilities where it has them, else from
    its text.
    """
    if reply.probabilities is None:
        parse = parse_relative if request.kind == "relative" else parse_absolute
        return parse(reply.text, reply.finish_reason)
    if not all(map(math.isfinite, reply.probabilities.values())):
        return Verdict(Status.UNPARSED, reason="the judge's probabilities are not finite")
    ranked = sorted(request.allowed, key=lambda token: -reply.probabilities.get(token, 0.0))  # type: ignore[union-attr]
    best, second = (reply.probabilities.get(token, 0.0) for token in ranked[:2])
    if best <= second:
        return Verdict(Status.UNPARSED, reason="the two likeliest verdicts are equally likely")
    return Verdict(Status.OK, ranked[0] if request.kind == "relative" else int(ranked[0]))


def judge_items(
    items: Iterable[Item],
    judge: Judge,
    store: JudgmentStore,
    plan: JudgePlan,
    progress: Callable[[JudgeRun], None] | None = None,
) -> JudgeRun:
    """Judge every item and store the verdicts.

    Args:
        items: pairs for a relative prompt, single answers for an absolute one.
        judge: who answers.
        store: where judgments go and what has been judged already.
        plan: prompt, rubric, budget and limits.
        progress: called after each batch.

    Returns:
        What was done; `check_complete` raises if something is missing.

    Raises:
        EvaluationIncomplete: after `max_consecutive_failures` failures in a row.
    """
    return ask(build_requests(items, plan, judge.fingerprint), judge, store, plan, progress)


def ask(
    requests: Iterable[JudgeRequest],
    judge: Judge,
    store: JudgmentStore,
    plan: JudgePlan,
    progress: Callable[[JudgeRun], None] | None = None,
) -> JudgeRun:
    """Ask requests that are already built (the audit's probes are), as `judge_items` does."""
    run = JudgeRun()
    source, retries = iter(requests), deque[tuple[JudgeRequest, list[dict[str, Any]]]]()
    while waiting := _next_batch(source, retries, store, plan, judge.fingerprint, run):
        with closing(judge.complete([request for request, _ in waiting.values()])) as replies:
            for key, reply in replies:
                request, attempts = waiting.pop(key)
                if reply.error is not None:
                    run.failed.add(reply.error, reply.refused)
                    if run.failed.in_a_row >= plan.max_consecutive_failures:
                        raise EvaluationIncomplete(
                            f"the judge failed {run.failed.in_a_row} times in a row: {run.failed}",
                            f"{len(store)} judgments are stored; {run.failed.remedy()}",
                            file=store.path,
                        )
                    continue
                run.failed.in_a_row = 0
                verdict = read_reply(request, reply)
                malformed = (
                    verdict.status in (Status.UNPARSED, Status.EMPTY)
                    and reply.probabilities is None
                )
                if malformed and request.attempt <= plan.max_reasks:
                    attempts.append(
                        {"seed": request.seed, "status": verdict.status.value, "raw": reply.text}
                    )
                    retries.append((_reask(request, plan), attempts))
                    run.reasked += 1
                else:
                    run.asked += store.append(
                        _row(request, verdict, judge.fingerprint, "judge", reply, attempts)
                    )
                if progress:
                    progress(run)
        if waiting:
            raise ValueError(f"the judge left {len(waiting)} requests without a reply")
    if progress:
        progress(run)
    return run


def _next_batch(
    source: Iterator[JudgeRequest],
    retries: deque[tuple[JudgeRequest, list[dict[str, Any]]]],
    store: JudgmentStore,
    plan: JudgePlan,
    fingerprint: str,
    run: JudgeRun,
) -> dict[str, tuple[JudgeRequest, list[dict[str, Any]]]]:
    """Up to a batch of requests that the judge must answer, by key; the others are counted, or
    stored together on the way.
    """
    batch: dict[str, tuple[JudgeRequest, list[dict[str, Any]]]] = {}
    decided: list[dict[str, Any]] = []
    while retries and len(batch) < plan.batch_size:
        request, attempts = retries.popleft()
        batch[request.key] = request, attempts
    while len(batch) < plan.batch_size:
        if (following := next(source, None)) is None:
            break
        request = following
        if request.key in store or request.key in batch:
            run.stored_before += 1
        elif plan.rules and (verdict := rule_verdict(request.kind, request.answers)):
            decided.append(_row(request, verdict, fingerprint, "rule"))
            run.by_rule += 1
        elif not request.prompt.fits:
            verdict = Verdict(
                Status.TRUNCATED,
                reason="the prompt does not fit the judge, even with its answers cut",
            )
            decided.append(_row(request, verdict, fingerprint, "limit"))
            run.asked += 1
        else:
            batch[request.key] = request, []
        if len(decided) == DECIDED_AT_ONCE:
            store.append_all(decided)
            decided = []
    store.append_all(decided)
    return batch


def _reask(request: JudgeRequest, plan: JudgePlan) -> JudgeRequest:
    """The request with a new seed, at a temperature where the seed matters."""
    seed = int(text_hash(f"{request.seed}:{request.attempt}:{request.key}")[:8], 16)
    return replace(
        request, seed=seed, temperature=plan.reask_temperature, attempt=request.attempt + 1
    )


def _row(
    request: JudgeRequest,
    verdict: Verdict,
    fingerprint: str,
    source: str,
    reply: JudgeReply | None = None,
    attempts: Sequence[Any] = (),
) -> dict[str, Any]:
    """The stored line. `lengths` are characters of the answers in the prompt's order."""
    row: dict[str, Any] = {
        "key": request.key,
        "kind": request.kind,
        "question_id": request.question_id,
        "order": request.order,
    }
    row |= {
        "status": verdict.status.value,
        "value": verdict.value,
        "reason": verdict.reason,
        "source": source,
        "judge": fingerprint,
    }
    row |= {
        "prompt_hash": request.prompt.hash,
        "answer_hashes": [text_hash(answer) for answer in request.answers],
    }
    row |= {
        "lengths": [len(answer) for answer in request.answers],
        "marker_in_answer": request.prompt.marker_in_answer,
        "cut": request.prompt.cut,
    }
    row |= {
        "seed": request.seed,
        "temperature": request.temperature,
        "attempts": list(attempts),
        "meta": dict(request.meta),
    }
    if reply is not None:
        row |= {"raw": reply.text, "finish_reason": reply.finish_reason}
        if reply.probabilities is not None:
            finite = {
                token: share for token, share in reply.probabilities.items() if math.isfinite(share)
            }
            row |= {
                "probabilities": finite,
                "mass": sum(finite.get(token, 0.0) for token in request.allowed),
            }
    return row
