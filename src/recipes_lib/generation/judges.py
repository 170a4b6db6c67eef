"""Judges made of models: a judge file -> something that `judging.judge` can ask, in this process or
behind an address.

Two verdict modes. `generate` lets the judge write its feedback and verdict. `logits` puts the
lead-in (`[RESULT]`) at the start of the judge's turn and reads the probabilities of the allowed
verdicts from the next token, in one forward pass; their sum is the mass. A judge's prompts start
alike, up to the fence's code: what they share is computed once, and every batch continues from it.
Weights load with the
first question, so an evaluation that finds all its judgments stored loads none.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes_lib.config.sections import ModelSection
from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.fingerprints import hash_of, model_fingerprint
from recipes_lib.data.conversations import Message
from recipes_lib.engine import Completion, Decoding, Engine, Request
from recipes_lib.generation.openai_engine import OpenAIEngine, Server
from recipes_lib.generation.targets import stand_in_recipe
from recipes_lib.generation.transformers_engine import (
    TransformersEngine,
    left_padded,
)
from recipes_lib.judging.judge import JudgePlan, JudgeRequest
from recipes_lib.judging.judge_file import JudgeFile, JudgeSection
from recipes_lib.judging.prometheus import JudgePrompt
from recipes_lib.models.architectures import has_plain_head, ready_to_answer
from recipes_lib.weights.base import explain_load_failure, load_model, model_path
from recipes_lib.weights.merge import free_memory

if TYPE_CHECKING:
    import torch

ASKED_AT_ONCE = 32  # by a judge in this process, which waits for the slowest of a batch
LEAST_SHARED_TOKENS = 32  # below it the extra forward pass saves nothing


class OpenJudge(ABC):
    """A judge that can be asked, and what its prompts may take.

    Attributes:
        fingerprint: see `judging.judge.Judge`.
        weights: hash of its weights, None where they are not here.
    """

    fingerprint: str
    weights: str | None = None

    def __init__(self, file: JudgeFile) -> None:
        self.file, self.section = file, file.judge

    @abstractmethod
    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        """Yield the replies, as `judging.judge.Judge` says."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text."""

    def reach(self) -> object:
        """Make sure that it answers; without it the first question does."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free its memory."""

    def plan(self, kind: str, reference: bool = False) -> JudgePlan:
        """Return how to ask: the prompt of a kind ("relative" or "absolute") and a rubric.

        Args:
            reference: whether the questions come with a reference answer that must be met.
        """
        section = self.section
        return JudgePlan(
            template=self.file.template(kind),
            rubric=self.file.rubric(reference),
            seed=section.seed,
            max_reasks=section.max_reasks,
            max_consecutive_failures=section.max_consecutive_failures,
            count_tokens=self.count_tokens,
            max_prompt_tokens=section.max_prompt_tokens,
        )


@contextmanager
def opened(file: JudgeFile) -> Iterator[OpenJudge]:
    """Give the judge of a file; afterwards its memory is free again.

    Raises:
        EnvironmentFault: the judge's tokenizer or weights cannot be had, or its server serves
            another model.
    """
    judge = _ServedJudge(file) if file.judge.engine == "openai" else _LocalJudge(file)
    try:
        yield judge
    finally:
        judge.close()


class _ServedJudge(OpenJudge):
    """A judge behind an OpenAI-compatible address."""

    def __init__(self, file: JudgeFile) -> None:
        super().__init__(file)
        self.fingerprint = file.fingerprint(
            hash_of(self.section.prompt_style, self.section.lead_in)
        )
        self.tokenizer = _tokenizer_if_here(self.section)
        self._engine: Engine | None = None

    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        yield from _written(self.reach(), requests, self._render, self.section)

    def reach(self) -> Engine:
        """Return what asks the server, which answers; one that the job starts late is waited for
        (launch/with_judge.sh ends this process where it does not start).
        """
        section = self.section
        if self._engine is None:
            if starts_late(section):
                wanted = Path(os.environ["RECIPES_JUDGE_WANTED"])
                wanted.touch()
                while not wanted.with_name(f"{wanted.name}.answers").exists():
                    time.sleep(0.1)
            server = Server(
                base_url=self.address(),
                model=section.model,
                api_key_variable=section.api_key_variable,
                concurrency=section.concurrency,
                timeout_s=section.timeout_s,
                max_retries=section.max_retries,
                first_pause_s=float(os.environ.get("RECIPES_RETRY_PAUSE_S", "0.5")),
            )
            self._engine = OpenAIEngine(server, logprobs=section.mode == "logits")
        return self._engine

    def address(self) -> str:
        """Return the server's address; one on this machine may have been started for this process
        alone (launch/with_judge.sh).
        """
        own = os.environ.get("RECIPES_JUDGE_URL") if self.section.served_here else None
        return own or str(self.section.base_url)

    def _render(self, prompt: JudgePrompt, key: str) -> Request:
        lead_in = self.section.lead_in if self.section.mode == "logits" else ""
        if self.section.prompt_style == "prometheus":
            return Request(key=key, prompt=f"{prompt.instruct_text()} {lead_in}".rstrip(" "))
        messages = [
            *_messages(prompt),
            *([Message(role="assistant", content=lead_in)] if lead_in else []),
        ]
        return Request(key=key, messages=tuple(messages))

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, or a careful guess."""
        return guessed_tokens(text) if self.tokenizer is None else len(self.tokenizer.encode(text))

    def close(self) -> None:
        self._engine = None


class _LocalJudge(OpenJudge):
    """A judge in this process."""

    def __init__(self, file: JudgeFile) -> None:
        from transformers import AutoTokenizer

        super().__init__(file)
        section = self.section
        self.model_section = ModelSection(
            name_or_path=section.model, revision=section.revision, dtype=section.dtype
        )
        self.path = model_path(self.model_section)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                self.path, revision=section.revision or "main"
            )
        except OSError as error:
            raise explain_load_failure(self.model_section, error) from None
        self.weights = model_fingerprint(self.path, section.revision)
        self.fingerprint = file.fingerprint(
            hash_of(self.weights, section.dtype, section.prompt_style, section.lead_in)
        )
        self._engine: Any = None
        self._reader: NextToken | None = None

    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        """Ask the model, loading it for the first question."""
        if self._engine is None:
            self._engine = self._load()
        source = iter(requests)
        while asked := list(islice(source, ASKED_AT_ONCE)):
            if self.section.mode == "generate":
                yield from _written(self._engine, asked, self._render, self.section)
                continue
            for allowed, group in groupby(asked, key=lambda request: request.allowed):
                rendered = [self._render(request.prompt, request.key) for request in group]
                yield from self._read(rendered, allowed)

    def _load(self) -> Any:
        import torch

        recipe = dataclasses.replace(stand_in_recipe(self.section.model), model=self.model_section)
        model = ready_to_answer(load_model(recipe, self.tokenizer))
        model = model.to("cuda") if torch.cuda.is_available() else model
        return TransformersEngine(
            model, self.tokenizer, self.fingerprint, batch_tokens=self.section.batch_tokens
        )

    def _render(self, prompt: JudgePrompt, key: str) -> Request:
        return Request(
            key=key, ids=tuple(judge_ids(prompt, self.section.prompt_style, self.tokenizer))
        )

    def _read(self, asked: Sequence[Request], allowed: Sequence[str]) -> Iterator[Completion]:
        """Read the verdicts of requests with the same allowed tokens from next-token
        probabilities.
        """
        import torch

        lead_ids, token_ids = verdict_tokens(self.tokenizer, self.section.lead_in, allowed)
        requests = [Request(key=request.key, ids=(*request.ids, *lead_ids)) for request in asked]
        reader = self._reader = self._reader or NextToken(
            self._engine.model, self.tokenizer.pad_token_id or 0
        )
        reader.share([request.ids for request in requests])

        def read(batch: Sequence[Request]) -> list[Completion]:
            logits = reader.logits([request.ids for request in batch])
            probabilities = torch.softmax(logits, dim=-1).cpu()
            return [
                Completion(
                    key=request.key,
                    probabilities={
                        verdict: float(row[list(places)].sum())
                        for verdict, places in token_ids.items()
                    },
                )
                for request, row in zip(batch, probabilities, strict=True)
            ]

        yield from self._engine.in_batches(requests, 0, read)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.backend_tokenizer.encode(text).ids)

    def close(self) -> None:
        self._engine = self._reader = None
        free_memory()


def starts_late(section: JudgeSection) -> bool:
    """Return whether the judge's server is started for this process alone, and only when it is
    asked: until then the GPU is the answering model's.
    """
    return section.served_here and "RECIPES_JUDGE_WANTED" in os.environ


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


def judge_ids(prompt: JudgePrompt, style: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a judge's prompt, up to where the judge starts to write.

    Raises:
        EnvironmentFault: style chat, and the tokenizer has no chat template.
    """
    if style == "prometheus":
        return list(tokenizer.encode(prompt.instruct_text()))
    if not tokenizer.chat_template:
        raise EnvironmentFault(
            "the judge's tokenizer has no chat template", "set judge.prompt_style: prometheus"
        )
    for messages in (
        _messages(prompt),
        [Message(role="user", content=f"{prompt.system}\n{prompt.user}")],
    ):
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like; some have no system role
            fault = error
            continue
        return list(tokenizer.encode(text, add_special_tokens=False))
    raise EnvironmentFault(
        f"the judge's chat template refuses the prompt: {str(fault).splitlines()[0]}",
        "set judge.prompt_style: prometheus",
    )


def _written(
    engine: Engine,
    requests: Iterable[JudgeRequest],
    render: Callable[[JudgePrompt, str], Request],
    section: JudgeSection,
) -> Iterator[Completion]:
    """Let the engine write the verdicts; probabilities become those of the allowed verdicts."""
    asked: dict[str, JudgeRequest] = {}
    source = iter(requests)
    first = next(source)
    decoding = Decoding(
        max_new_tokens=section.max_new_tokens,
        temperature=max(first.temperature, section.temperature),
    )

    def rendered() -> Iterator[Request]:
        for request in chain([first], source):
            asked[request.key] = request
            yield dataclasses.replace(render(request.prompt, request.key), seed=request.seed)

    for done in engine.complete(rendered(), decoding):
        request = asked.pop(done.key)
        if done.probabilities is not None:
            found = dict.fromkeys(request.allowed, 0.0)
            for token, share in done.probabilities.items():
                if token.strip() in found:
                    found[token.strip()] += share
            done = Completion(key=done.key, probabilities=found)
        yield done


def _messages(prompt: JudgePrompt) -> list[Message]:
    return [
        Message(role="system", content=prompt.system),
        Message(role="user", content=prompt.user),
    ]


def _tokenizer_if_here(section: JudgeSection) -> Any:
    """The tokenizer of a served model, if it lies on this machine; nothing is downloaded for it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            section.model, revision=section.revision or "main", local_files_only=True
        )
    except (OSError, ValueError):
        return None


class NextToken:
    """The logits after prompts, read from one model.

    Args:
        model: a causal language model in eval mode.
        pad: id that fills up shorter rows.
    """

    def __init__(self, model: Any, pad: int) -> None:
        from recipes_lib.generation.kv_cache import cache_name

        self.model, self.pad = model, pad
        self._plain_head = has_plain_head(model)
        self._cache_name = cache_name(model)
        self._shared: tuple[int, ...] = ()
        self._cache: Any = None

    def share(self, rows: Sequence[Sequence[int]]) -> None:
        """Compute what these rows start with alike, unless it is there already; rows given to
        `logits` must start with it.
        """
        if self._shared and all(
            tuple(row[: len(self._shared)]) == self._shared and len(row) > len(self._shared)
            for row in rows
        ):
            return
        alike = common_prefix(rows)
        if len(rows) < 2 or alike < LEAST_SHARED_TOKENS or not self._plain_head:
            self._shared, self._cache = (), None
            return
        import torch
        from transformers import DynamicCache

        self._shared = tuple(rows[0][:alike])
        ids = torch.tensor([self._shared], device=self.model.device)
        with torch.inference_mode():
            done = self.model.get_decoder()(input_ids=ids, use_cache=True)
        self._cache = getattr(done, self._cache_name)
        if (
            type(self._cache) is not DynamicCache
        ):  # another kind of state (Mamba and the like) may not be continued in a padded batch
            self._shared, self._cache = (), None

    def logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits after each row's last token, shape (rows, vocabulary), in float32.

        The head is applied in float32: in half precision the logits of two verdicts are often
        exactly equal.
        """
        import torch

        known = len(self._shared)
        ids, mask = left_padded([row[known:] for row in rows], self.pad)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        positions = known + (mask.cumsum(-1) - 1).clamp(min=0)
        inputs: dict[str, object] = {
            "input_ids": ids,
            "position_ids": positions,
            "use_cache": False,
        }
        with torch.inference_mode():
            if self._cache is not None:
                cache = copy.deepcopy(self._cache)
                cache.batch_repeat_interleave(len(rows))
                inputs |= {self._cache_name: cache, "use_cache": True}
                mask = torch.cat([mask.new_ones(len(rows), known), mask], dim=1)
            inputs["attention_mask"] = mask
            if not self._plain_head:
                return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
            head = self.model.get_output_embeddings()
            hidden = self.model.get_decoder()(**inputs).last_hidden_state[:, -1]
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows start with alike; at least one token of each is left over.

    Example:
        >>> common_prefix([[1, 2, 3], [1, 2, 4]]), common_prefix([[1, 2], [1, 2, 3]])
        (2, 1)
    """
    least, most = min(map(tuple, rows)), max(map(tuple, rows))  # what these two share, all share
    shortest = min(map(len, rows)) - 1
    return next((place for place in range(shortest) if least[place] != most[place]), shortest)


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
    common = 0
    while (
        common + 1 < min(map(len, spaced.values()))
        and len({ids[common] for ids in spaced.values()}) == 1
    ):
        common += 1
    tokens: dict[str, set[int]] = {verdict: {ids[common]} for verdict, ids in spaced.items()}
    lead_ids = next(iter(spaced.values()))[:common]
    if lead_ids == bare:
        for verdict in allowed:
            tight = encode(f"{lead_in}{verdict}")
            if tight[:common] == bare:
                tokens[verdict].add(tight[common])
    if not _distinct(tokens):  # some verdicts merge with the space and some do not
        lead_ids, tokens = (
            encode(f"{lead_in} "),
            {verdict: {encode(verdict)[0]} for verdict in allowed},
        )
    if not _distinct(tokens):
        raise EnvironmentFault(
            f"this judge's tokenizer cannot tell {', '.join(allowed)} apart by one token",
            "set judge.mode: generate",
        )
    return lead_ids, tokens


def _distinct(tokens: dict[str, set[int]]) -> bool:
    """Whether no token stands for two verdicts."""
    return sum(map(len, tokens.values())) == len(set().union(*tokens.values()))
