"""Asking a judge in both orders, over a store; the judge is a model in this process or a server.

Each reply is stored as it arrives, and what is stored is not asked again: the same command
continues. A malformed verdict is asked again with a new seed, and every attempt is stored. A
request that failed or was refused is missing, and the evaluation says so. In mode `logits` the
lead-in (`[RESULT]`) stands at the start of the judge's turn and the next token is the verdict.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from recipes_lib.config.preflight import local_folder
from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import Row, hash_of, model_fingerprint
from recipes_lib.data.conversations import Message
from recipes_lib.evals.engine import Completion, HFEngine, Request, Sampling, ask_missing
from recipes_lib.evals.engine_openai import OpenAIEngine
from recipes_lib.evals.log import JudgeFacts, Store, text_hash
from recipes_lib.evals.models import bare_recipe
from recipes_lib.evals.prompts import JudgePrompt, build_prompt, fence_code
from recipes_lib.evals.questions import Question
from recipes_lib.evals.recipe import JudgeSection
from recipes_lib.evals.verdicts import CHOICES, GRADES, parse_verdict, verdict_row
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.load import explain_load_failure, free_memory, load_model, model_path

MAX_REASKS = 2  # of a malformed verdict
REASK_TEMPERATURE = 0.7
_FINGERPRINT = (
    *("model", "revision", "engine", "mode", "temperature", "max_new_tokens", "seed"),
    *("prompt_style", "lead_in"),
)


@dataclass(frozen=True)
class Item:
    """One answer to grade (absolute), or a candidate's and its opponent's to compare (relative)."""

    name: str  # its id among the judgments
    instruction: str
    answer: str
    opponent: str | None = None
    reference: str | None = None
    question: Question | None = None  # what it answers, where a suite asks
    turn: int = 1
    draw: int = 1
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
    prompt: JudgePrompt

    @property
    def allowed(self) -> tuple[str, ...]:
        """The verdicts that there are."""
        return GRADES if len(self.answers) == 1 else CHOICES


# ---- asking ----


def ask(
    items: Sequence[Item],
    judge: Judge,
    store: Store,
    name: str = "",
    *,
    by_reference: bool = False,
    rules: bool = True,
) -> list[Row]:
    """Return the judgments of items; what the store lacks is asked, and stored as it arrives.

    Args:
        items: all to be compared, or all to be graded.
        name: stands beside the progress bar.
        by_reference: whether items with a reference answer have a rubric of their own.
        rules: whether empty and identical answers are decided without the judge.
    """
    section = judge.section
    asked = build_requests(items, judge, by_reference, rules)
    requests = {request.row["key"]: request for request in asked}
    store.append(request.row for request in requests.values() if "status" in request.row)

    def read(request: JudgeRequest, reply: Completion) -> Row | JudgeRequest:
        """The row with its verdict, or the request with a new seed where that is malformed."""
        row, verdict = request.row, read_reply(request, reply, section.mode)
        is_malformed = verdict["status"] in ("unparsed", "empty") and reply.probabilities is None
        if not is_malformed or len(row["attempts"]) >= MAX_REASKS:
            return row | verdict
        attempt = {"seed": row["seed"], "status": verdict["status"], "raw": reply.text}
        attempts = [*row["attempts"], attempt]
        seed = int(text_hash(f"{row['seed']}:{len(attempts)}:{row['key']}")[:8], 16)
        again = {"seed": seed, "temperature": REASK_TEMPERATURE, "attempts": attempts}
        return replace(request, row=row | again)

    most = section.max_consecutive_failures
    ask_missing(store, requests, judge.complete, read, "judgment", name, most)
    return [row for key in requests if (row := store.get(key))]


def build_requests(
    items: Sequence[Item], judge: Judge, by_reference: bool = False, rules: bool = True
) -> Iterator[JudgeRequest]:
    """Yield the requests of each item, in both orders of a pair; arguments as for `ask`."""
    if not items:
        return
    section = judge.section
    template = section.template("absolute" if items[0].opponent is None else "relative")
    rubrics = {used: section.rubric_of(used) for used in {False, by_reference}}
    for item in items:
        answers = (item.answer,) if item.opponent is None else (item.answer, item.opponent)
        for order in item.orders:
            shown = answers[::-1] if order == "BA" else answers
            decided = rule_verdict(shown) if rules else None
            prompt = build_prompt(
                template,
                rubrics[by_reference and item.reference is not None],
                item.instruction,
                shown,
                item.reference,
                code=fence_code(item.name, shown, str(section.seed)),
                # what a rule decides is not sent, so its prompt may be too long
                count_tokens=None if decided else judge.count_tokens,
                max_tokens=section.max_prompt_tokens,
            )
            # the prompt may have its answers cut
            hashes = text_hash(f"{prompt.system}\0{prompt.user}"), [*map(text_hash, shown)]
            parts = [item.name, order, judge.fingerprint, *hashes]
            row = {
                "key": text_hash(json.dumps(parts)),
                "question_id": item.name,
                "question": item.question.id if item.question else item.name,
                "order": order,
                "probe": item.probe,
                "judge": judge.fingerprint,
                "source": "judge",
                "lengths": [*map(len, shown)],  # characters
                "cut": prompt.cut,
                "seed": section.seed,
                "temperature": 0.0,
                "attempts": [],  # those before, with other seeds
            }
            if decided:
                row |= decided | {"source": "rule"}
            elif not prompt.fits:
                reason = "the prompt does not fit the judge, even with its answers cut"
                row |= verdict_row("truncated", reason) | {"source": "limit"}
            yield JudgeRequest(row, shown, prompt)


def rule_verdict(answers: Sequence[str]) -> Row | None:
    """Return the verdict that needs no judge: an empty answer loses, identical ones tie."""
    first, *others = (answer.strip() for answer in answers)
    if not others:
        return None if first else verdict_row("ok", "empty answer", "1")
    if first == others[0]:
        return verdict_row("ok", "identical answers", "tie")
    if not (first and others[0]):
        return verdict_row("ok", "empty answer", "A" if first else "B")
    return None


def read_reply(request: JudgeRequest, reply: Completion, mode: str) -> Row:
    """Return what is stored of a reply: its verdict, and the text or probabilities behind it."""
    allowed, known = request.allowed, reply.probabilities
    if reply.finish_reason == "prompt_too_long":
        return verdict_row("truncated", "the prompt is longer than the judge's context")
    if known is None:
        verdict = parse_verdict(reply.text, allowed, reply.finish_reason, mode == "json")
        return verdict | {"finish_reason": reply.finish_reason, "raw": reply.text}
    shares = dict.fromkeys(allowed, 0.0)
    for token, share in known.items():
        if token.strip() in shares:
            shares[token.strip()] += share
    if not all(map(math.isfinite, shares.values())):
        return verdict_row("unparsed", "the judge's probabilities are not finite")
    best, second, *_ = sorted(allowed, key=lambda verdict: -shares[verdict])
    verdict = verdict_row("unparsed", "the two likeliest verdicts are equally likely")
    if shares[best] > shares[second]:
        verdict = verdict_row("ok", value=best)
    return verdict | {"probabilities": shares}


# ---- the judge ----


class Judge:
    """A judge that can be asked.

    Attributes:
        fingerprint: hash of weights (or served model), decoding and verdict mode.
        weights: hash of its weights, None where they are not here.
    """

    def __init__(self, section: JudgeSection) -> None:
        self.section = section
        self.is_served = section.engine == "openai"
        self._engine: Any = None
        self._source = ModelSection(
            name_or_path=section.model, revision=section.revision, dtype=section.dtype
        )
        path = section.model if self.is_served else model_path(self._source)
        if not self.is_served and local_folder(bare_recipe(self._source)) is None:
            self.count_tokens("")  # which fetches it: the fingerprint has its commit
        self.weights = None if self.is_served else model_fingerprint(path, section.revision)
        own = [self.weights, section.dtype] if self.weights else [section.extra_body]
        self.fingerprint = hash_of(*own, *(getattr(section, name) for name in _FINGERPRINT))

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer; None where only the server has it."""
        from transformers import AutoTokenizer

        section = self.section
        try:
            return AutoTokenizer.from_pretrained(
                section.model if self.is_served else model_path(self._source),
                revision=section.revision or "main",
                local_files_only=self.is_served,
            )
        except (OSError, ValueError) as error:
            if not self.is_served:
                raise explain_load_failure(self._source, error) from None
            return None

    def facts(self) -> JudgeFacts:
        """Return what a log says about the judge."""
        return JudgeFacts(
            name=self.section.model,
            fingerprint=self.fingerprint,
            server=getattr(self._engine, "version", None),
            weights=self.weights,
            model=self.section.model,
            mode=self.section.mode,
            weak=self.section.weak,
        )

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, or where only the server has the tokenizer a careful guess:
        three ASCII characters to a token, and a token per byte of other scripts.
        """
        if self.tokenizer is not None:
            return len(self.tokenizer.encode(text))
        ascii_characters = sum(map(str.isascii, text))
        return ascii_characters // 3 + len(text.encode("utf-8", "replace")) - ascii_characters

    def complete(self, requests: Sequence[JudgeRequest]) -> Generator[Completion]:
        """Return the replies to requests of one kind and temperature as they arrive."""
        if self._engine is None:
            self._engine = self._reach() if self.is_served else self._load()
        section, first = self.section, requests[0]
        if section.mode == "logits" and not self.is_served:
            lead_in, tokens = verdict_tokens(self.tokenizer, section.lead_in, first.allowed)
            rendered = [self._render(request, lead_in) for request in requests]
            return self._engine.complete(rendered, Sampling(), tokens)
        temperature = section.temperature
        if temperature is not None:
            temperature = max(temperature, first.row["temperature"])
        sampling = Sampling(max_new_tokens=section.max_new_tokens, temperature=temperature)
        return self._engine.complete(map(self._render, requests), sampling)

    def _reach(self) -> OpenAIEngine:
        """Return what asks the server, once launch/with_judge.sh has started it where it does."""
        if self.section.served_here and "RECIPES_JUDGE_WANTED" in os.environ:
            wanted = Path(os.environ["RECIPES_JUDGE_WANTED"])
            wanted.touch()
            while not wanted.with_name(f"{wanted.name}.answers").exists():
                time.sleep(0.1)
        is_logits = self.section.mode == "logits"
        return OpenAIEngine(self.section, self.section.model, logprobs=is_logits)

    def _load(self) -> HFEngine:
        import torch

        model = ready_to_answer(load_model(bare_recipe(self._source), self.tokenizer))
        model = model.to("cuda") if torch.cuda.is_available() else model
        return HFEngine(
            lambda: nullcontext(model), self.tokenizer, self.fingerprint, self.section.batch_tokens
        )

    def _render(self, request: JudgeRequest, lead_ids: Sequence[int] = ()) -> Request:
        """Return a request as its engine takes it: ids here, text or messages for a server."""
        section, prompt = self.section, request.prompt
        bare = Request(key=request.row["key"], seed=request.row["seed"])
        lead_in = section.lead_in if section.mode == "logits" else ""
        if section.prompt_style == "prometheus":
            text = prompt.instruct_text()
            if self.is_served:
                return replace(bare, prompt=f"{text} {lead_in}".rstrip(" "))
            return replace(bare, ids=(*self.tokenizer.encode(text), *lead_ids))
        messages = [Message(role="user", content=f"{prompt.system}\n{prompt.user}")]
        if section.system_role:
            system = Message(role="system", content=prompt.system)
            messages = [system, Message(role="user", content=prompt.user)]
        if not self.is_served:
            return replace(bare, ids=(*self._chat_ids(messages), *lead_ids))
        if lead_in:
            messages.append(Message(role="assistant", content=lead_in))
        schema = None
        if section.mode == "json":
            result = {"type": "string", "enum": list(request.allowed)}
            schema = {
                "type": "object",
                "properties": {"feedback": {"type": "string"}, "result": result},
                "required": ["feedback", "result"],
                "additionalProperties": False,
            }
        return replace(bare, messages=tuple(messages), schema=schema)

    def _chat_ids(self, messages: list[Message]) -> list[int]:
        """The token ids of a conversation, up to where the judge starts to write."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            what = f"the judge's chat template refuses the prompt: {str(error).splitlines()[0]}"
            hint = "without a system role (Gemma 2): judge.system_role: false"
            other = "a judge without a chat template: judge.prompt_style: prometheus"
            raise EnvironmentFault(what, hint, other) from None
        return list(self.tokenizer.encode(text, add_special_tokens=False))


@contextmanager
def opened(section: JudgeSection) -> Iterator[Judge]:
    """Give a judge; afterwards its memory is free again."""
    judge = Judge(section)
    try:
        yield judge
    finally:
        judge._engine = None
        free_memory()


def verdict_tokens(
    tokenizer: Any, lead_in: str, allowed: Sequence[str]
) -> tuple[list[int], dict[str, int]]:
    """Return the lead-in's token ids and, per verdict, the token that means it.

    A verdict follows after a space. Where the tokenizer makes the space a token of its own, before
    digits for example, or merges it with some verdicts only, it becomes part of the lead-in.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    spaced = {verdict: encode(f"{lead_in} {verdict}") for verdict in allowed}
    columns = enumerate(zip(*spaced.values(), strict=False))
    common = next((place for place, column in columns if len(set(column)) > 1), 0)
    lead_ids = spaced[allowed[0]][:common]
    tokens = {verdict: ids[common] for verdict, ids in spaced.items()}
    if len(set(tokens.values())) < len(allowed):
        lead_ids = encode(f"{lead_in} ")
        tokens = {verdict: encode(verdict)[0] for verdict in allowed}
    if len(set(tokens.values())) < len(allowed):
        what = f"this judge's tokenizer has no single token for each of {', '.join(allowed)}"
        raise EnvironmentFault(what, "set judge.mode: generate")
    return lead_ids, tokens
