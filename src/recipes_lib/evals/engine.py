"""The two engines, a model in this process and a server with OpenAI's interface: requests in,
completions out as they are finished; and what is missing in a store asked of them.

Sampling in this process is seeded per request: the noise of a row comes from the request's own
generator, and the largest noisy probability is taken, which is exact sampling. So an answer does
not depend on the rest of its batch, apart from the rounding of other matrix shapes.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from tqdm import tqdm

from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipesError
from recipes_lib.core.files import Row, hash_of, valid_texts
from recipes_lib.core.terminal import count
from recipes_lib.data.conversations import Message
from recipes_lib.evals.log import Store
from recipes_lib.evals.recipe import ServerSection
from recipes_lib.models.families import has_plain_head

if TYPE_CHECKING:
    import openai
    import torch
    from transformers import PreTrainedTokenizerBase

MAX_ROWS = 256
MOST_FAILURES = 20  # requests in a row without a reply, after which no more are asked
# padded tokens per batch to begin with: larger ones are no faster on a CPU; a GPU halves the number
# until a batch fits
_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
LONGEST_PAUSE_S = 60.0  # the client follows a Retry-After of up to a minute
# the client checks no types, so a reply may hold anything
_UNREADABLE = (AttributeError, TypeError, LookupError, ValueError, RecursionError)

Asked = TypeVar("Asked")


# Why a request that a server refused for good has no text, as `Completion.finish_reason`.
TOO_LONG = "prompt_too_long"
REFUSED = "refused"
# what servers say of a prompt that their context does not hold (vLLM, llama.cpp, OpenAI, SGLang)
_SAYS_TOO_LONG = re.compile(
    r"context.{0,20}(length|size|window)|context_length|exceed\w*.{0,40}(context|length|tokens)"
    r"|(prompt|input|request).{0,40}too (long|large)|longer than.{0,40}(context|length)"
    r"|max_model_len|too many tokens",
    re.IGNORECASE | re.DOTALL,
)
# what they say of a text that they may not answer (OpenAI, Azure, Mistral and others)
_SAYS_REFUSED = re.compile(
    r"content.?(filter|policy|management)|usage polic|moderation|safety|flagged", re.IGNORECASE
)


class EvaluationIncomplete(RecipesError):
    """Answers or judgments are missing; the same command continues."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


class ServerGone(EvaluationIncomplete):
    """Too many requests in a row had no reply."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: at temperature 0 greedily."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return the settings that count: the seed of greedy decoding changes no key."""
        ignored = () if self.temperature else ("seed",)
        return {name: value for name, value in asdict(self).items() if name not in ignored}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt."""

    key: str  # what the completion is filed under
    prompt: str | None = None  # the rendered text; None where only the server knows the format
    ids: tuple[int, ...] = ()  # its token ids
    messages: tuple[Message, ...] = ()  # the conversation, for a server that renders it itself
    schema: Mapping[str, Any] | None = None  # of the JSON to answer, where a server can
    seed: int = 0  # of this request alone
    row: Row = field(default_factory=dict)  # what is stored beside its answer


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back for a request: a text, or probabilities, or an error."""

    key: str
    text: str = ""
    finish_reason: str = "stop"  # or "length" (cut at max_new_tokens), TOO_LONG or REFUSED
    error: str | None = None  # why there is no answer, though there may be one later
    refusal: str | None = None  # the words of a server that will never answer this request
    model: str | None = None  # the name that a server gave the model in its reply
    probabilities: Mapping[str, float] | None = None  # of the next token, in place of a text


def ask_missing(
    store: Store,
    requests: Mapping[str, Asked],
    complete: Callable[[Iterator[Asked]], Generator[Completion]],
    read: Callable[[Asked, Completion], Row],
    noun: str,
    name: str = "",
) -> None:
    """Ask for what a store lacks, and append each row as its reply arrives.

    Args:
        requests: by the key of their row.
        complete: an engine; errors are completions. It takes a request when it sends it.
        read: makes a reply the row.
        noun: what a row is (answer, judgment), and `name` what it is about.
    """
    waiting = {key: request for key, request in requests.items() if key not in store}
    if not waiting:
        return
    title = f"{noun}s of {name}" if name else f"{noun}s"
    reasons: Counter[str] = Counter()
    in_a_row = most = 0
    # A server that refuses every request is set up wrongly, and its refusals say nothing of the
    # requests: they are stored once it has answered one.
    has_answered = any(map(_is_answer, store.values()))
    refused: list[Completion] = []
    # what is on its way when too many have failed is waited for, and stored
    sent = takewhile(lambda _: most < MOST_FAILURES, waiting.values())
    with tqdm(total=len(waiting), desc=title, unit="") as bar, closing(complete(sent)) as replies:
        for reply in replies:
            if reply.error is None:
                in_a_row = 0
                has_answered = has_answered or reply.refusal is None
                refused.append(reply)
                if has_answered:
                    store.append(read(waiting[each.key], each) for each in refused)
                    bar.update(len(refused))
                    refused.clear()
                continue
            in_a_row += 1
            most = max(most, in_a_row)
            reasons[reply.error] += 1
    for reply in refused:
        reasons[f"the server refused every request: {reply.refusal}"] += 1
    if reasons:
        stored = sum(key in store for key in requests)
        ((reason, times),) = reasons.most_common(1)
        what = f"{len(requests) - stored} of {len(requests)} {title} are missing: {reason}"
        hint = f"{count(stored, noun)} stored; run the same command to continue"
        kind = EvaluationIncomplete if most < MOST_FAILURES else ServerGone
        raise kind(f"{what} ({count(times, 'time')})", hint, file=store.path)


def _is_answer(row: Row) -> bool:
    """Whether a stored row came from a reply with a text."""
    return row.get("finish_reason") not in (None, TOO_LONG, REFUSED)


class HFEngine:
    """Answers with a model in this process, in left-padded batches of similar length. A batch that
    does not fit the memory is halved, and so are those after it.

    Args:
        using: gives a context with the model in eval mode, the wanted adapter active.
        fingerprint: of the weights and their precision.
        batch_tokens: padded tokens, prompt and answer, per batch to begin with.
    """

    name = "transformers"
    version = None
    served_name = ""

    def __init__(
        self,
        using: Callable[[], AbstractContextManager[Any]],
        tokenizer: PreTrainedTokenizerBase,
        fingerprint: str,
        batch_tokens: int | None = None,
    ) -> None:
        self.using, self.tokenizer, self.fingerprint = using, tokenizer, fingerprint
        self.batch_tokens = batch_tokens

    def complete(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        verdicts: Mapping[str, int] | None = None,
    ) -> Generator[Completion]:
        """Yield completions batch by batch, longest prompts first: texts, or the probabilities of
        the tokens `verdicts` as the next one.
        """
        import torch

        waiting = sorted(requests, key=lambda request: -len(request.ids))
        while waiting:
            batch, done = waiting[:1], None
            width = len(batch[0].ids) + (0 if verdicts else sampling.max_new_tokens)
            try:
                with self.using() as model:
                    if len(batch[0].ids) >= _context(model):
                        done = [Completion(key=batch[0].key, finish_reason=TOO_LONG)]
                    else:
                        limit = self.batch_tokens or _BATCH_TOKENS.get(model.device.type, 8192)
                        batch = waiting[: max(1, min(MAX_ROWS, limit // max(width, 1)))]
                        if verdicts:
                            done = self._weigh(model, batch, verdicts)
                        else:
                            done = self._write(model, batch, sampling)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            if done is None:  # outside the except, where what failed holds no memory any more
                torch.cuda.empty_cache()
                self.batch_tokens = len(batch) // 2 * width
                text = f"out of memory: batches of {self.batch_tokens:,} padded tokens from now on"
                print(text, file=sys.stderr, flush=True)
                continue
            answered = {completion.key for completion in done}
            waiting = [request for request in waiting if request.key not in answered]
            yield from done

    def _weigh(
        self, model: Any, batch: Sequence[Request], verdicts: Mapping[str, int]
    ) -> list[Completion]:
        shares = _next_logits(model, *self._padded(model, batch)).softmax(-1).cpu()
        return [
            Completion(
                key=request.key,
                probabilities={verdict: float(row[token]) for verdict, token in verdicts.items()},
            )
            for request, row in zip(batch, shares, strict=True)
        ]

    def _write(self, model: Any, batch: Sequence[Request], sampling: Sampling) -> list[Completion]:
        import torch
        from transformers import LogitsProcessorList, TemperatureLogitsWarper

        ids, mask = self._padded(model, batch)
        most, context = sampling.max_new_tokens, _context(model)
        room = min(most, context - ids.shape[1])
        processors = LogitsProcessorList()
        if sampling.temperature:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
            processors.append(_SeededSampling([request.seed for request in batch], model.device))
        configured = getattr(model.generation_config, "eos_token_id", None)
        listed = configured if isinstance(configured, list) else [configured]
        ends = sorted({self.tokenizer.eos_token_id, *listed} - {None})
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=room,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                logits_processor=processors,
            )
        completions = []
        for request, row in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            if end is None and room < min(most, context - len(request.ids)):
                continue  # alone it has more room than beside a longer prompt: asked again
            completions.append(
                Completion(
                    key=request.key,
                    text=self.tokenizer.decode(row[:end], skip_special_tokens=True).strip(),
                    finish_reason="length" if end is None else "stop",
                )
            )
        return completions

    def _padded(self, model: Any, batch: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both (rows, longest row), padded on the left."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [torch.tensor(request.ids, dtype=torch.long) for request in batch]
        ids = pad_sequence(rows, True, self.tokenizer.pad_token_id or 0, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
        return ids.to(model.device), mask.to(model.device)


def _context(model: Any) -> int:
    """How many tokens a model can read."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _next_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits after each row's last token, shape (rows, vocabulary). The head is applied in
    float32: in half precision the logits of two verdicts are often exactly equal.
    """
    import torch

    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.inference_mode():
        if not has_plain_head(model):
            return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        head = model.get_output_embeddings()
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, -1]
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)


class _SeededSampling:
    """A logits processor after which the largest entry is a sample, of each row's own generator."""

    def __init__(self, seeds: Sequence[int], device: Any) -> None:
        import torch

        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Return log(p / noise) per entry."""
        probabilities = scores.float().softmax(-1)
        noise = probabilities.new_empty(probabilities.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return (probabilities / noise).log()


class OpenAIEngine:
    """Answers through a server. A request that it refuses ends alone, and is never an answer.

    Args:
        model: the name it serves the model under.
        fingerprint: `answered_by` of the answers; a judge's are known by its own.
    """

    name = "openai"

    def __init__(self, server: ServerSection, model: str, fingerprint: str = "") -> None:
        import openai  # half a second, which stored judgments do without

        self._openai = openai
        self.server, self.model, self.fingerprint = server, model, fingerprint
        self.served_name = model
        name = server.api_key_variable
        key = os.environ.get(name, "").strip() if name else "no-key-needed"
        if not (key and key.isascii() and key.isprintable()):
            raise EnvironmentFault(f"the environment variable {name} is not set, or holds no key")
        self._key = key
        self._limit = "max_tokens"  # or what the server asks for in its place
        self.version = asyncio.run(self._version())

    def _client(self) -> openai.AsyncOpenAI:
        return self._openai.AsyncOpenAI(
            base_url=self.server.address,
            api_key=self._key,
            timeout=self.server.timeout_s,
            max_retries=self.server.max_retries,
        )

    async def _version(self) -> str | None:
        """What the server says of itself, as vLLM does."""
        async with self._client() as client:
            try:
                root = str(client.base_url).rstrip("/").removesuffix("/v1")
                once = client.with_options(max_retries=0)
                reply: Any = await once.get(f"{root}/version", cast_to=object)
                return str(reply["version"])[:40]
            except (self._openai.OpenAIError, *_UNREADABLE):
                return None

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Generator[Completion]:
        """Yield completions as they arrive, `concurrency` requests in flight."""
        source = iter(requests)
        tasks: set[asyncio.Task[Completion]] = set()
        with asyncio.Runner() as runner:
            client, loop = self._client(), runner.get_loop()
            try:
                while True:
                    for request in islice(source, self.server.concurrency - len(tasks)):
                        tasks.add(loop.create_task(self._ask(client, request, sampling)))
                    if not tasks:
                        return
                    first = asyncio.FIRST_COMPLETED
                    done, tasks = runner.run(asyncio.wait(tasks, return_when=first))
                    for task in done:
                        yield task.result()
            finally:
                for task in tasks:
                    task.cancel()
                runner.run(client.close())

    async def _ask(
        self, client: openai.AsyncOpenAI, request: Request, sampling: Sampling
    ) -> Completion:
        """Return the completion of one request, or its error after the client's last attempt."""
        # of the whole reply: the client's timeout begins anew with each byte
        longest = (self.server.timeout_s + LONGEST_PAUSE_S) * (self.server.max_retries + 1)
        try:
            async with asyncio.timeout(longest):
                reply = await self._send(client, request, sampling)
            return self._read(request, reply)
        except (self._openai.OpenAIError, TimeoutError, *_UNREADABLE) as error:
            reason, why = self._reason(error), self._refusal(error)
            if why is None:
                return Completion(key=request.key, error=reason)
            return Completion(key=request.key, finish_reason=why, refusal=reason)

    def _refusal(self, error: Exception) -> str | None:
        """Why the server will never answer this request; None where the same may pass later, or
        where the fault is not the request's (a wrong key, an unknown model).
        """
        if not isinstance(error, self._openai.APIStatusError):
            return None
        said = f"{error} {error.body}"[:3000]
        if error.status_code == 413:
            return TOO_LONG
        if error.status_code in (400, 422) and _SAYS_TOO_LONG.search(said):
            return TOO_LONG
        if error.status_code == 422:
            return REFUSED
        if error.status_code in (400, 403, 451) and _SAYS_REFUSED.search(said):
            return REFUSED
        return None

    def _reason(self, error: Exception) -> str:
        """What the client says, in one line; a server may send the key back."""
        said = valid_texts(" ".join(str(error)[:3000].split()).replace(self._key, "***"))[:300]
        return f"{self.server.address}: {said or type(error).__name__}"

    async def _send(self, client: openai.AsyncOpenAI, request: Request, sampling: Sampling) -> Any:
        """Send what is rendered here as token ids or text, else messages."""
        settings: dict[str, Any] = {"model": self.model, "extra_body": self.server.extra_body}
        settings["temperature"] = sampling.temperature
        if sampling.temperature:
            settings |= {"top_p": 1.0, "seed": request.seed % 2**31}
        if request.prompt is not None:
            settings["prompt"] = list(request.ids) or request.prompt
            settings["max_tokens"] = sampling.max_new_tokens
            return await client.completions.create(**settings)
        if request.schema is not None:
            verdict = {"name": "verdict", "schema": dict(request.schema), "strict": True}
            settings["response_format"] = {"type": "json_schema", "json_schema": verdict}
        settings["messages"] = list(request.messages)
        create: Any = client.chat.completions.create
        limit = self._limit  # another request may change it meanwhile
        try:
            return await create(**settings, **{limit: sampling.max_new_tokens})
        except self._openai.BadRequestError as error:
            if limit != "max_tokens" or "max_completion_tokens" not in str(error.body):
                raise
            self._limit = "max_completion_tokens"
            return await create(**settings, **{self._limit: sampling.max_new_tokens})

    def _read(self, request: Request, reply: Any) -> Completion:
        """Read a reply of either endpoint. No text is an empty one, as of a model that declines."""
        model = getattr(reply, "model", None)
        if not isinstance(model, str):
            model = ""
        asked = re.escape(self.model.rsplit("/", 1)[-1])
        if model and not re.search(rf"(?i)(^|/){asked}(?![\w.])", model):
            raise ValueError(f"asked for '{self.model}', but '{model[:100]}' answered")
        choice = reply.choices[0]
        message = getattr(choice, "message", None)
        text = (message.content or "") if message else choice.text
        finish = str(getattr(choice, "finish_reason", None) or "stop")
        if finish.lower() in ("abort", "aborted", "cancelled", "error"):
            raise ValueError(f"the server cut it short (finish_reason {finish})")
        served = valid_texts(model[:200]) or None
        if finish == "content_filter":  # OpenAI's word for an answer that it withheld, or cut
            refusal = f"{self.server.address}: finish_reason {finish}"
            return Completion(key=request.key, finish_reason=REFUSED, refusal=refusal, model=served)
        text, finish = valid_texts(text.strip()), valid_texts(finish)
        return Completion(key=request.key, text=text, finish_reason=finish, model=served)


Engine: TypeAlias = HFEngine | OpenAIEngine


def answered_by(section: ServerSection, model: str, weights: str | None) -> str:
    """Return what answers are known by: the hash of the weights, and the name that a server has
    for them.
    """
    if section.engine != "openai":
        return str(weights)
    return hash_of("openai", model, weights, section.extra_body)
