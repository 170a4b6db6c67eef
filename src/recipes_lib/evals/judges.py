"""Judges made of models: a judge file -> something that `judge.ask` can ask, in this process or
behind an address.

Mode `generate` lets the judge write its feedback and verdict, mode `json` has a server answer in
JSON. Mode `logits` puts the lead-in (`[RESULT]`) at the start of the judge's turn and reads the
probabilities of the allowed verdicts from the next token, in one forward pass; their sum is the
mass. Weights load with the first question, so an evaluation that finds all its judgments stored
loads none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import hash_of, model_fingerprint, read_object
from recipes_lib.data.conversations import Message
from recipes_lib.evals.engine import Completion, Request, Sampling
from recipes_lib.evals.engine_hf import HFEngine
from recipes_lib.evals.engine_openai import OpenAIEngine
from recipes_lib.evals.judge import JudgePlan, JudgeRequest
from recipes_lib.evals.log import JudgeFacts
from recipes_lib.evals.models import bare_recipe
from recipes_lib.evals.prompts import JudgePrompt
from recipes_lib.evals.recipe import JudgeFile
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.load import explain_load_failure, load_model, model_path
from recipes_lib.weights.merge import RECORD, free_memory

ASKED_AT_ONCE = 32  # by a judge in this process, which waits for the slowest of a batch
_FINGERPRINT = ("model", "revision", "engine", "mode", "temperature", "max_new_tokens", "seed")
_STYLE = ("prompt_style", "lead_in")


class Judge:
    """A judge that can be asked.

    Attributes:
        fingerprint: hash of weights (or served model), decoding and verdict mode.
        weights: hash of its weights, None where they are not here.
    """

    def __init__(self, file: JudgeFile) -> None:
        from transformers import AutoTokenizer

        self.file, self.section = file, file.judge
        self.served = self.section.engine == "openai"
        self._engine: Any = None
        self.weights: str | None = None
        self.source = ModelSection(
            name_or_path=self.section.model,
            revision=self.section.revision,
            dtype=self.section.dtype,
        )
        path = self.section.model if self.served else model_path(self.source)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                path, revision=self.section.revision or "main", local_files_only=self.served
            )
        except (OSError, ValueError) as error:
            if not self.served:
                raise explain_load_failure(self.source, OSError(str(error))) from None
            self.tokenizer = None  # the server has it
        if not self.served:
            self.weights = model_fingerprint(path, self.section.revision)
        own = [self.weights, self.section.dtype] if self.weights else [self.section.extra_body]
        names = (*_FINGERPRINT, *_STYLE)
        self.fingerprint = hash_of(*own, *(getattr(self.section, name) for name in names))

    def plan(self, kind: str, reference: bool = False) -> JudgePlan:
        """Return how to ask: the prompt of a kind ("relative" or "absolute") and a rubric.

        Args:
            reference: whether the questions come with a reference answer that must be met.
        """
        return JudgePlan(
            template=self.file.template(kind),
            rubric=self.file.rubric(reference),
            seed=self.section.seed,
            mode=self.section.mode,
            max_reasks=self.section.max_reasks,
            max_consecutive_failures=self.section.max_consecutive_failures,
            count_tokens=self.count_tokens,
            max_prompt_tokens=self.section.max_prompt_tokens,
        )

    def facts(self) -> JudgeFacts:
        """Return what a log says about the judge."""
        section = self.section
        merged = read_object(Path(section.model) / RECORD)  # a run of ours, merged
        return JudgeFacts(
            name=self.file.path.stem,
            fingerprint=self.fingerprint,
            model=section.model,
            revision=section.revision,
            engine=section.engine,
            mode=section.mode,
            prompt_style=section.prompt_style,
            temperature=section.temperature,
            max_new_tokens=section.max_new_tokens,
            max_context_tokens=section.max_context_tokens,
            server=getattr(self._engine, "version", None),
            weak=section.weak,
            weights=self.weights,
            run=merged.get("run"),
        )

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, or a careful guess."""
        if self.tokenizer is None:
            return guessed_tokens(text)
        return len(self.tokenizer.encode(text))

    def complete(self, requests: Iterable[JudgeRequest]) -> Iterator[Completion]:
        """Yield the replies, as `judge.AsksJudge` says."""
        if self._engine is None:
            self._engine = self._reached() if self.served else self._load()
        if self.served:
            yield from self._written(requests)
            return
        source = iter(requests)
        while asked := list(islice(source, ASKED_AT_ONCE)):
            if self.section.mode == "generate":
                yield from self._written(asked)
                continue
            for allowed, group in groupby(asked, key=lambda request: request.allowed):
                yield from self._read_next_token(list(group), allowed)

    def _reached(self) -> OpenAIEngine:
        """Return what asks the server; one that the job starts late is waited for
        (launch/with_judge.sh ends this process where it does not start).
        """
        if self.section.served_here and "RECIPES_JUDGE_WANTED" in os.environ:
            wanted = Path(os.environ["RECIPES_JUDGE_WANTED"])
            wanted.touch()
            while not wanted.with_name(f"{wanted.name}.answers").exists():
                time.sleep(0.1)
        logprobs = self.section.mode == "logits"
        return OpenAIEngine(self.section, self.section.model, logprobs=logprobs)

    def _load(self) -> HFEngine:
        import torch

        recipe = bare_recipe(self.source)
        model = ready_to_answer(load_model(recipe, self.tokenizer))
        model = model.to("cuda") if torch.cuda.is_available() else model
        return HFEngine(model, self.tokenizer, self.fingerprint, self.section.batch_tokens)

    def _written(self, requests: Iterable[JudgeRequest]) -> Iterator[Completion]:
        """Let the engine write the verdicts; probabilities become those of the allowed verdicts."""
        asked: dict[str, JudgeRequest] = {}
        source = iter(requests)
        first = next(source)
        own = self.section.temperature
        sampling = Sampling(
            max_new_tokens=self.section.max_new_tokens,
            temperature=None if own is None else max(first.temperature, own),
        )

        def rendered() -> Iterator[Request]:
            for request in chain([first], source):
                asked[request.key] = request
                yield replace(self._render(request), seed=request.seed)

        for done in self._engine.complete(rendered(), sampling):
            request = asked.pop(done.key)
            if done.probabilities is not None:
                found = dict.fromkeys(request.allowed, 0.0)
                for token, share in done.probabilities.items():
                    if token.strip() in found:
                        found[token.strip()] += share
                done = replace(done, probabilities=found)
            yield done

    def _render(self, request: JudgeRequest) -> Request:
        prompt, key = request.prompt, request.key
        if not self.served:
            return Request(key=key, ids=tuple(self._ids(prompt)))
        lead_in = self.section.lead_in if self.section.mode == "logits" else ""
        if self.section.prompt_style == "prometheus":
            return Request(key=key, prompt=f"{prompt.instruct_text()} {lead_in}".rstrip(" "))
        messages = _messages(prompt, self.section.system_role)
        if self.section.mode == "json":
            return Request(key=key, messages=tuple(messages), schema=_schema(request.allowed))
        if lead_in:
            messages.append(Message(role="assistant", content=lead_in))
        return Request(key=key, messages=tuple(messages))

    def _ids(self, prompt: JudgePrompt) -> list[int]:
        """The token ids of a prompt, up to where the judge starts to write."""
        if self.section.prompt_style == "prometheus":
            return list(self.tokenizer.encode(prompt.instruct_text()))
        advice = "set judge.prompt_style: prometheus"
        if not self.tokenizer.chat_template:
            raise EnvironmentFault("the judge's tokenizer has no chat template", advice)
        for system_role in (True, False):
            try:
                text = self.tokenizer.apply_chat_template(
                    _messages(prompt, system_role), tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # templates raise what they like; some have no system role
                fault = str(error).splitlines()[0]
                continue
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        raise EnvironmentFault(f"the judge's chat template refuses the prompt: {fault}", advice)

    def _read_next_token(
        self, asked: Sequence[JudgeRequest], allowed: Sequence[str]
    ) -> Iterator[Completion]:
        lead_ids, tokens = verdict_tokens(self.tokenizer, self.section.lead_in, allowed)
        requests = [
            Request(key=request.key, ids=(*self._ids(request.prompt), *lead_ids))
            for request in asked
        ]
        yield from self._engine.verdicts(requests, tokens)

    def close(self) -> None:
        """Free its memory."""
        self._engine = None
        free_memory()


@contextmanager
def opened(file: JudgeFile) -> Iterator[Judge]:
    """Give the judge of a file; afterwards its memory is free again.

    Raises:
        EnvironmentFault: the judge's tokenizer or weights cannot be had, or its server serves
            another model.
    """
    judge = Judge(file)
    try:
        yield judge
    finally:
        judge.close()


def guessed_tokens(text: str) -> int:
    """Return a careful guess of a text's tokens where the tokenizer is only on the server; a prompt
    that is too long would be refused.

    Three ASCII characters to a token; other scripts cost up to a token per byte in vocabularies
    made for English.

    Example:
        >>> guessed_tokens("twelve chars"), guessed_tokens("\u4f60\u597d")
        (4, 6)
    """
    ascii_characters = sum(map(str.isascii, text))
    return ascii_characters // 3 + len(text.encode("utf-8", "surrogatepass")) - ascii_characters


def _messages(prompt: JudgePrompt, system_role: bool) -> list[Message]:
    if not system_role:
        return [Message(role="user", content=f"{prompt.system}\n{prompt.user}")]
    return [
        Message(role="system", content=prompt.system),
        Message(role="user", content=prompt.user),
    ]


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
    """Return the lead-in's token ids and, per verdict, the ids of the tokens that mean it.

    A verdict may follow with or without a space. Where the tokenizer makes the space a token of its
    own, as some do before digits, it becomes part of the lead-in.

    Raises:
        EnvironmentFault: two verdicts start with the same token, so that the next token cannot tell
            them apart.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    bare = encode(lead_in)
    spaced = {verdict: encode(f"{lead_in} {verdict}") for verdict in allowed}
    common, shortest = 0, min(map(len, spaced.values()))
    while common + 1 < shortest and len({ids[common] for ids in spaced.values()}) == 1:
        common += 1
    tokens: dict[str, set[int]] = {verdict: {ids[common]} for verdict, ids in spaced.items()}
    lead_ids = next(iter(spaced.values()))[:common]
    if lead_ids == bare:
        for verdict in allowed:
            tight = encode(f"{lead_in}{verdict}")
            if tight[:common] == bare:
                tokens[verdict].add(tight[common])
    if not _distinct(tokens):  # some verdicts merge with the space and some do not
        lead_ids = encode(f"{lead_in} ")
        tokens = {verdict: {encode(verdict)[0]} for verdict in allowed}
    if not _distinct(tokens):
        what = f"this judge's tokenizer cannot tell {', '.join(allowed)} apart by one token"
        raise EnvironmentFault(what, "set judge.mode: generate")
    return lead_ids, tokens


def _distinct(tokens: dict[str, set[int]]) -> bool:
    """Whether no token stands for two verdicts."""
    return sum(map(len, tokens.values())) == len(set().union(*tokens.values()))
