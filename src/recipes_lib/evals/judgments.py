"""What a judge is asked about answers, and what it says: judgments, kept in judgments.jsonl.

A pair is judged in both orders. What a rule decides (an empty answer, identical answers, an answer
that will never come) is stored beside the rest and not asked.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes_lib.core.files import Row
from recipes_lib.evals.asking import ask_missing
from recipes_lib.evals.engines.base import REFUSED, TOO_LONG, Completion
from recipes_lib.evals.log import Store, text_hash
from recipes_lib.evals.prompts import VERDICTS, build_prompt, fence_code, parse_verdict, verdict_row

if TYPE_CHECKING:
    from recipes_lib.evals.judge import Judge


@dataclass(frozen=True)
class Item:
    """One answer to grade (absolute), or a candidate's and its opponent's to compare (relative)."""

    name: str  # its id among the judgments
    instruction: str
    answer: str
    opponent: str | None = None
    reference: str | None = None  # by which an answer is graded
    question_id: str = ""  # of a suite's question
    sample: dict[str, Any] = field(default_factory=dict)  # what a suite's sample says beside it
    unanswered: str = ""  # why an answer is missing for good, so that there is nothing to judge
    probe: str = ""  # the kind of probe that it is

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders it is judged in: the candidate is Response A in AB, Response B in BA."""
        return ("single",) if self.opponent is None else ("AB", "BA")


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


def ask(items: Sequence[Item], judge: "Judge", store: Store, name: str = "") -> list[Row]:
    """Return the judgments of items; ask for those not stored, and store each as it arrives.

    Args:
        items: all to be compared, or all to be graded.
        name: stands beside the progress bar.
    """
    requests = {request.row["key"]: request for request in build_requests(items, judge)}
    store.append(request.row for request in requests.values() if "status" in request.row)

    def read(request: JudgeRequest, reply: Completion) -> Row:
        return request.row | _verdict_in(request, reply, judge.section.mode)

    ask_missing(store, requests, judge.complete, read, "judgment", name, judge.gone)
    return [store[key] for key in requests if key in store]


def build_requests(items: Sequence[Item], judge: "Judge") -> Iterator[JudgeRequest]:
    """Yield the requests of each item, in both orders of a pair; arguments as for `ask`."""
    if not items:
        return
    section = judge.section
    template = section.template("absolute" if items[0].opponent is None else "relative")
    plain_rubric = section.rubric_of(by_reference=False)
    reference_rubric = section.rubric_of(by_reference=True)
    for item in items:
        for order in item.orders:
            answers: tuple[str, ...] = (item.answer,)
            if item.opponent is not None:
                answers = (item.answer, item.opponent)
            if order == "BA":
                # the candidate is Response B
                answers = answers[::-1]
            decided = _decided_by_rule(item, answers)
            prompt = build_prompt(
                template,
                plain_rubric if item.reference is None else reference_rubric,
                item.instruction,
                answers,
                item.reference,
                code=fence_code(item.name, answers),
                # what a rule decides is not sent, so its prompt may be too long
                count_tokens=None if decided else judge.count_tokens,
                max_tokens=section.max_prompt_tokens,
            )
            # all that decides a judgment; in the prompt the answers may be cut
            hashes = [text_hash(answer) for answer in answers]
            key: list[Any] = [item.name, order, judge.fingerprint, text_hash(prompt.text), hashes]
            if item.unanswered:
                # an empty answer that was written has another judgment: it loses by rule
                key.append(item.unanswered)
            row = {
                "key": text_hash(json.dumps(key)),
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


def _decided_by_rule(item: Item, answers: Sequence[str]) -> Row | None:
    """The verdict where no judge is needed: an empty answer loses, and identical ones tie."""
    if item.unanswered:
        return verdict_row("refused", f"there is no answer: {item.unanswered}")
    if item.probe:
        # whether the judge lets an empty answer lose is what is asked
        return None
    texts = [answer.strip() for answer in answers]
    if all(texts) and len(set(texts)) == len(texts):
        return None
    if len(texts) == 1:
        return verdict_row("ok", "empty answer", "1")
    if texts[0] == texts[1]:
        return verdict_row("ok", "identical answers", "tie")
    return verdict_row("ok", "empty answer", "A" if texts[0] else "B")


def _verdict_in(request: JudgeRequest, reply: Completion, mode: str) -> Row:
    """The stored form of a reply: its verdict, and its text or probabilities."""
    if reply.finish_reason == TOO_LONG:
        reason = "prompt too long: it is longer than the judge's context"
        return verdict_row("truncated", reason) | {"finish_reason": TOO_LONG}
    if reply.finish_reason == REFUSED:
        reason = f"refused by the server: {reply.refusal}"
        return verdict_row("refused", reason) | {"finish_reason": REFUSED}
    if reply.probabilities is None:
        verdict = parse_verdict(reply.text, request.allowed, reply.finish_reason, mode == "json")
        return verdict | {"finish_reason": reply.finish_reason, "raw": reply.text}
    shares = dict(reply.probabilities)
    best, second, *_ = sorted(request.allowed, key=lambda verdict: -shares[verdict])
    if all(map(math.isfinite, shares.values())) and shares[best] > shares[second]:
        verdict = verdict_row("ok", value=best)
    else:
        verdict = verdict_row("unparsed", "no verdict is the most likely")
    raw = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
    return verdict | {"probabilities": shares, "raw": raw}
