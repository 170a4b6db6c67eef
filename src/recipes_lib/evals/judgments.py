"""What a judge is asked about answers, and what it says: judgments, kept in judgments.jsonl.

A pair is judged in both orders. What a rule decides (an empty answer, identical answers, an answer
that will never come) is stored beside the rest and not asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from recipes_lib.core.files import Row
from recipes_lib.evals.asking import ask_missing
from recipes_lib.evals.engines.base import REFUSED, TOO_LONG, Completion
from recipes_lib.evals.items import Item
from recipes_lib.evals.log import Store, text_hash
from recipes_lib.evals.prompts import (
    VERDICTS,
    JudgePrompt,
    build_prompt,
    fence_code,
    parse_verdict,
    verdict_row,
)
from recipes_lib.evals.recipe import JudgeSection


@dataclass(frozen=True)
class JudgeRequest:
    """One question to the judge about an item in an order."""

    row: Row  # what is stored of it; without a verdict, unless it needs no judge
    answers: tuple[str, ...]  # in the prompt's order, before they are cut
    prompt: str

    @property
    def allowed(self) -> tuple[str, ...]:
        """The verdicts that there are."""
        return VERDICTS[len(self.answers)]


class AskedJudge(Protocol):
    """What is needed of a judge here."""

    section: JudgeSection
    fingerprint: str

    @property
    def count_tokens(self) -> Callable[[str], int] | None:
        """How many tokens a text has for the judge."""
        ...

    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        """Return the replies to requests of one kind as they arrive."""
        ...


def ask(items: Sequence[Item], judge: AskedJudge, store: Store, name: str = "") -> list[Row]:
    """Return the judgments of items; ask for those not stored, and store each as it arrives.

    Args:
        items: all to be compared, or all to be graded.
        name: stands beside the progress bar.
    """
    requests = {request.row["key"]: request for request in build_requests(items, judge)}
    store.append(request.row for request in requests.values() if "status" in request.row)

    def read(request: JudgeRequest, reply: Completion) -> Row:
        return request.row | read_reply(request, reply, judge.section.mode)

    ask_missing(store, requests, judge.complete, read, "judgment", name)
    return [store[key] for key in requests if key in store]


def build_requests(items: Sequence[Item], judge: AskedJudge) -> Iterator[JudgeRequest]:
    """Yield the requests of each item, in both orders of a pair; arguments as for `ask`."""
    if not items:
        return
    section = judge.section
    kind = "absolute" if items[0].opponent is None else "relative"
    template = section.template(kind)
    plain_rubric = section.rubric_of(by_reference=False)
    reference_rubric = section.rubric_of(by_reference=True)
    for item in items:
        rubric = plain_rubric if item.reference is None else reference_rubric
        for order in item.orders:
            answers = item.answers(order)
            decided = _decided_by_rule(item, answers)
            prompt = build_prompt(
                template,
                rubric,
                item.instruction,
                answers,
                item.reference,
                code=fence_code(item.name, answers),
                # what a rule decides is not sent, so its prompt may be too long
                count_tokens=None if decided else judge.count_tokens,
                max_tokens=section.max_prompt_tokens,
            )
            row = {
                "key": _key(item, order, answers, prompt, judge.fingerprint),
                "question_id": item.name,
                "question": item.question_id or item.name,
                "order": order,
                "probe": item.probe,
                "judge": judge.fingerprint,
                "source": "judge",
                "cut": prompt.cut,
            }
            if decided:
                row |= {"source": "rule"} | decided
            elif not prompt.fits:
                reason = "the prompt does not fit the judge, even with its answers cut"
                row |= {"source": "limit"} | verdict_row("truncated", reason)
            yield JudgeRequest(row=row, answers=answers, prompt=prompt.text)


def _key(
    item: Item, order: str, answers: Sequence[str], prompt: JudgePrompt, fingerprint: str
) -> str:
    """Return the hash of all that decides a judgment; in the prompt the answers may be cut."""
    hashes = [text_hash(answer) for answer in answers]
    decides = [item.name, order, fingerprint, text_hash(prompt.text), hashes]
    if item.unanswered:  # an empty answer that was written loses by rule
        decides.append(item.unanswered)
    return text_hash(json.dumps(decides))


def _decided_by_rule(item: Item, answers: Sequence[str]) -> Row | None:
    """Return the verdict, or why there is none, where the judge is not needed."""
    if item.unanswered:
        return verdict_row("refused", f"there is no answer: {item.unanswered}")
    if item.probe:  # of the judge, even where the answer is empty
        return None
    return rule_verdict(answers)


def rule_verdict(answers: Sequence[str]) -> Row | None:
    """Return the verdict that needs no judge: an empty answer loses, identical ones tie."""
    texts = [answer.strip() for answer in answers]
    if len(texts) == 1:
        return None if texts[0] else verdict_row("ok", "empty answer", "1")
    first, second = texts
    if first == second:
        return verdict_row("ok", "identical answers", "tie")
    if first and second:
        return None
    return verdict_row("ok", "empty answer", "A" if first else "B")


def read_reply(request: JudgeRequest, reply: Completion, mode: str) -> Row:
    """Return the stored form of a reply: its verdict and its text or probabilities."""
    if reply.finish_reason == TOO_LONG:
        reason = "prompt too long: it is longer than the judge's context"
        return verdict_row("truncated", reason) | {"finish_reason": TOO_LONG}
    if reply.finish_reason == REFUSED:
        reason = f"refused by the server: {reply.refusal}"
        return verdict_row("refused", reason) | {"finish_reason": REFUSED}
    if reply.probabilities is not None:
        return _most_likely(request.allowed, dict(reply.probabilities))
    verdict = parse_verdict(reply.text, request.allowed, reply.finish_reason, mode == "json")
    return verdict | {"finish_reason": reply.finish_reason, "raw": reply.text}


def _most_likely(allowed: Sequence[str], shares: dict[str, float]) -> Row:
    """Return the verdict with the largest probability, if there is one alone."""
    best, second, *_ = sorted(allowed, key=lambda verdict: -shares[verdict])
    is_finite = all(map(math.isfinite, shares.values()))
    if is_finite and shares[best] > shares[second]:
        verdict = verdict_row("ok", value=best)
    else:
        verdict = verdict_row("unparsed", "no verdict is the most likely")
    raw = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
    return verdict | {"probabilities": shares, "raw": raw}
