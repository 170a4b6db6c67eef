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
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import Row, hash_of, model_fingerprint
from recipes_lib.data.conversations import Message
from recipes_lib.evals.engine import (
    Completion,
    EvaluationIncomplete,
    Failures,
    HFEngine,
    Request,
    Sampling,
)
from recipes_lib.evals.engine_openai import OpenAIEngine
from recipes_lib.evals.log import JudgeFacts, Store, text_hash
from recipes_lib.evals.models import bare_recipe
from recipes_lib.evals.prompts import JudgePrompt, build_prompt, fence_code
from recipes_lib.evals.questions import Question
from recipes_lib.evals.recipe import JudgeSection
from recipes_lib.evals.verdicts import CHOICES, GRADES, JudgeVerdict, parse_verdict
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.load import explain_load_failure, free_memory, load_model, model_path

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

    key: str
    item: Item
    order: str
    answers: tuple[str, ...]  # in the prompt's order, before they are cut
    prompt: JudgePrompt
    seed: int = 0
    temperature: float = 0.0
    attempts: tuple[Row, ...] = ()  # those before, with other seeds

    @property
    def allowed(self) -> tuple[str, ...]:
        """The verdicts that there are."""
        return GRADES if self.item.opponent is None else CHOICES


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
    """Have items judged, store the verdicts as they arrive, and return all rows of these items;
    what the store holds is not asked.

    Args:
        items: all to be compared, or all to be graded.
        name: stands beside the progress bar.
        by_reference: whether the rubric for questions with a reference answer is used.
        rules: whether empty and identical answers are decided without the judge.

    Raises:
        EvaluationIncomplete: judgments are missing, or `max_consecutive_failures` requests in a row
            failed; the same command continues.
    """
    section, fingerprint = judge.section, judge.fingerprint
    asked = build_requests(items, judge, by_reference, rules)
    requests = {request.key: request for request in asked}
    decided = []
    for request in requests.values():
        if request.key in store:
            continue
        if rules and (verdict := rule_verdict(request.answers)):
            decided.append(_row(request, verdict, fingerprint, "rule"))
        elif not request.prompt.fits:
            reason = "the prompt does not fit the judge, even with its answers cut"
            verdict = JudgeVerdict("truncated", reason=reason)
            decided.append(_row(request, verdict, fingerprint, "limit"))
    store.append(decided)
    waiting = {key: request for key, request in requests.items() if key not in store}
    failed = Failures()
    with tqdm(total=len(waiting), desc=f"judgments {name}", disable=not waiting) as bar:
        while waiting:
            again: dict[str, JudgeRequest] = {}
            with closing(judge.complete(list(waiting.values()))) as replies:
                for reply in replies:
                    failed.add(reply)
                    if failed.in_a_row >= section.max_consecutive_failures:
                        again.clear()
                        break
                    if reply.error is not None:
                        continue
                    request = waiting[reply.key]
                    verdict = read_reply(request, reply, section.mode)
                    is_malformed = verdict.status in ("unparsed", "empty")
                    has_text = reply.probabilities is None
                    if is_malformed and has_text and len(request.attempts) < section.max_reasks:
                        again[request.key] = _with_new_seed(request, verdict, reply)
                        continue
                    store.append([_row(request, verdict, fingerprint, "judge", reply)])
                    bar.update()
            waiting = again
    if missing := sum(key not in store for key in requests):
        what = f"{missing} judgments are missing: {failed}"
        hint = f"{len(store)} judgments are stored; {failed.remedy()}"
        raise EvaluationIncomplete(what, hint, file=store.path)
    return [row for key in requests if (row := store.get(key))]


def build_requests(
    items: Sequence[Item], judge: Judge, by_reference: bool = False, rules: bool = True
) -> Iterator[JudgeRequest]:
    """Yield the requests of each item, in both orders of a pair; arguments as for `ask`."""
    if not items:
        return
    section = judge.section
    template = section.template("absolute" if items[0].opponent is None else "relative")
    rubric = section.rubric_of(by_reference)
    for item in items:
        answers = (item.answer,) if item.opponent is None else (item.answer, item.opponent)
        for order in item.orders:
            shown = answers[::-1] if order == "BA" else answers
            # what a rule decides is not sent, so its prompt may be too long
            is_sent = not rules or rule_verdict(shown) is None
            prompt = build_prompt(
                template,
                rubric,
                item.instruction,
                shown,
                item.reference,
                code=fence_code(item.name, shown, str(section.seed)),
                count_tokens=judge.count_tokens if is_sent else None,
                max_tokens=section.max_prompt_tokens,
            )
            # the prompt may have its answers cut
            hashes = [*map(text_hash, shown)]
            parts = [item.name, order, judge.fingerprint, prompt.hash, hashes]
            key = text_hash(json.dumps(parts))
            yield JudgeRequest(key, item, order, shown, prompt, section.seed)


def rule_verdict(answers: Sequence[str]) -> JudgeVerdict | None:
    """Return the verdict that needs no judge: an empty answer loses (grade 1), identical answers
    tie; None otherwise.
    """
    first, *others = (answer.strip() for answer in answers)
    if not others:
        return None if first else JudgeVerdict("ok", 1, "empty answer")
    if first == others[0]:
        return JudgeVerdict("ok", "tie", "identical answers")
    if not (first and others[0]):
        return JudgeVerdict("ok", "A" if first else "B", "empty answer")
    return None


def read_reply(request: JudgeRequest, reply: Completion, mode: str = "generate") -> JudgeVerdict:
    """Return the verdict of a reply, from its probabilities where it has them."""
    shares = reply.probabilities
    if shares is None:
        return parse_verdict(reply.text, request.allowed, reply.finish_reason, mode == "json")
    if not all(map(math.isfinite, shares.values())):
        return JudgeVerdict("unparsed", reason="the judge's probabilities are not finite")
    best, second, *_ = sorted(request.allowed, key=lambda token: -shares.get(token, 0.0))
    if shares.get(best, 0.0) <= shares.get(second, 0.0):
        return JudgeVerdict("unparsed", reason="the two likeliest verdicts are equally likely")
    return JudgeVerdict("ok", int(best) if best.isdigit() else best)


def _with_new_seed(request: JudgeRequest, verdict: JudgeVerdict, reply: Completion) -> JudgeRequest:
    """The request to be asked again, at a temperature where the seed matters."""
    attempt = {"seed": request.seed, "status": verdict.status, "raw": reply.text}
    number = len(request.attempts) + 1
    seed = int(text_hash(f"{request.seed}:{number}:{request.key}")[:8], 16)
    attempts = (*request.attempts, attempt)
    return replace(request, seed=seed, temperature=REASK_TEMPERATURE, attempts=attempts)


def _row(
    request: JudgeRequest,
    verdict: JudgeVerdict,
    fingerprint: str,
    source: str,
    reply: Completion | None = None,
) -> Row:
    """The stored line. `lengths` are characters of the answers in the prompt's order."""
    item = request.item
    row = {
        "key": request.key,
        "question_id": item.name,
        "order": request.order,
        "status": verdict.status,
        "value": verdict.value,
        "reason": verdict.reason,
        "source": source,
        "judge": fingerprint,
        "lengths": list(map(len, request.answers)),
        "cut": request.prompt.cut,
        "seed": request.seed,
        "temperature": request.temperature,
        "attempts": list(request.attempts),
        "question": item.question.id if item.question else item.name,
        "probe": item.probe,
    }
    if reply is None:
        return row
    if (shares := reply.probabilities) is None:
        return row | {"finish_reason": reply.finish_reason, "raw": reply.text}
    finite = {token: share for token, share in shares.items() if math.isfinite(share)}
    return row | {"raw": None, "probabilities": finite}


# ---- the judge ----


class Judge:
    """A judge that can be asked.

    Attributes:
        fingerprint: hash of weights (or served model), decoding and verdict mode.
        weights: hash of its weights, None where they are not here.

    Raises:
        EnvironmentFault: its tokenizer cannot be had.
    """

    def __init__(self, section: JudgeSection) -> None:
        from transformers import AutoTokenizer

        self.section = section
        self.is_served = section.engine == "openai"
        self._engine: Any = None
        self._source = ModelSection(
            name_or_path=section.model, revision=section.revision, dtype=section.dtype
        )
        path = section.model if self.is_served else model_path(self._source)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                path, revision=section.revision or "main", local_files_only=self.is_served
            )
        except (OSError, ValueError) as error:
            if not self.is_served:
                raise explain_load_failure(self._source, error) from None
            self.tokenizer = None  # the server has it
        self.weights = None if self.is_served else model_fingerprint(path, section.revision)
        own = [self.weights, section.dtype] if self.weights else [section.extra_body]
        self.fingerprint = hash_of(*own, *(getattr(section, name) for name in _FINGERPRINT))

    def facts(self) -> JudgeFacts:
        """Return what a log says about the judge."""
        return JudgeFacts(
            name=self.section.name or self.section.model,
            fingerprint=self.fingerprint,
            server=getattr(self._engine, "version", None),
            weights=self.weights,
            model=self.section.model,
            mode=self.section.mode,
            weak=self.section.weak,
        )

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, or a careful guess where the tokenizer is only on the
        server, which would refuse a prompt that is too long: three ASCII characters to a token,
        and a token per byte of other scripts.
        """
        if self.tokenizer is not None:
            return len(self.tokenizer.encode(text))
        ascii_characters = sum(map(str.isascii, text))
        return ascii_characters // 3 + len(text.encode("utf-8", "replace")) - ascii_characters

    def complete(self, requests: Sequence[JudgeRequest]) -> Generator[Completion]:
        """Yield the reply to each request as it arrives, in any order; errors are replies.

        Args:
            requests: at least one, all of one kind and temperature.
        """
        if self._engine is None:
            self._engine = self._reach() if self.is_served else self._load()
        allowed, section = requests[0].allowed, self.section
        if section.mode == "logits" and not self.is_served:
            lead_in, tokens = verdict_tokens(self.tokenizer, section.lead_in, allowed)
            rendered = [self._render(request, lead_in) for request in requests]
            yield from self._engine.verdicts(rendered, tokens)
            return
        temperature = section.temperature
        if temperature is not None:
            temperature = max(temperature, requests[0].temperature)
        sampling = Sampling(max_new_tokens=section.max_new_tokens, temperature=temperature)
        for done in self._engine.complete(map(self._render, requests), sampling):
            if done.probabilities is not None:
                shares = dict.fromkeys(allowed, 0.0)
                for token, share in done.probabilities.items():
                    if token.strip() in shares:
                        shares[token.strip()] += share
                done = replace(done, probabilities=shares)
            yield done

    def _reach(self) -> OpenAIEngine:
        """Return what asks the server; one that the job starts late is waited for
        (launch/with_judge.sh ends this process where it does not start).
        """
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
        """Return a request as the engine takes it: token ids in this process, text or messages for
        a server.
        """
        section, prompt = self.section, request.prompt
        bare = Request(key=request.key, seed=request.seed)
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
        if section.mode == "json":
            return replace(bare, messages=tuple(messages), schema=_schema(request.allowed))
        if lead_in:
            messages.append(Message(role="assistant", content=lead_in))
        return replace(bare, messages=tuple(messages))

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
    """Give a judge; afterwards its memory is free again.

    Raises:
        EnvironmentFault: it cannot be had, or its server serves another model.
    """
    judge = Judge(section)
    try:
        yield judge
    finally:
        judge._engine = None
        free_memory()


def _schema(allowed: Sequence[str]) -> dict[str, Any]:
    """The JSON that a judge answers in mode json."""
    result = {"type": "string", "enum": list(allowed)}
    return {
        "type": "object",
        "properties": {"feedback": {"type": "string"}, "result": result},
        "required": ["feedback", "result"],
        "additionalProperties": False,
    }


def verdict_tokens(
    tokenizer: Any, lead_in: str, allowed: Sequence[str]
) -> tuple[list[int], dict[str, set[int]]]:
    """Return the lead-in's token ids and, per verdict, the ids of the token that means it.

    A verdict follows after a space. Where the tokenizer makes the space a token of its own, before
    digits for example, or merges it with some verdicts only, it becomes part of the lead-in.

    Raises:
        EnvironmentFault: two verdicts start with the same token.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

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
    return lead_ids, {verdict: {token} for verdict, token in tokens.items()}
