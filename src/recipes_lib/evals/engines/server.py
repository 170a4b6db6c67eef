"""The engine behind an address: a server with OpenAI's interface (vLLM, llama.cpp, SGLang, hosted).
A request that it refuses ends alone, and is never an answer.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import hash_of, valid_texts
from recipes_lib.evals.engines import base
from recipes_lib.evals.engines.base import REFUSED, TOO_LONG, Completion, Request, Sampling, Target

if TYPE_CHECKING:
    import openai

    from recipes_lib.evals.recipe import ServerSection

NAME = "openai"
LONGEST_PAUSE_S = 60.0  # the client follows a Retry-After of up to a minute
FIRST_IN_FLIGHT = 8  # requests at once, before the server has shown how fast it is
# the client checks no types, so a reply may hold anything
_UNREADABLE = (AttributeError, TypeError, LookupError, ValueError, RecursionError)
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
# beside what is asked, nothing that a model's folder or a server recommends
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_CUT_SHORT = ("abort", "aborted", "cancelled", "error")  # finish reasons of no whole answer
_WITHHELD = "content_filter"  # OpenAI's finish reason of an answer that it withheld, or cut


class ServerEngine(base.Engine):
    """Answers through a server, which serves the model under the name `model`. Where the prompt is
    rendered here, so is it known which tokens end an answer.
    """

    def __init__(self, server: ServerSection, model: str, end_tokens: Sequence[int] = ()) -> None:
        import openai  # half a second, which stored judgments do without

        self._openai = openai
        self.server = server
        self.model = model
        self.end_tokens = list(end_tokens)
        variable = server.api_key_variable
        key = os.environ.get(variable, "").strip() if variable else "no-key-needed"
        if not (key and key.isascii() and key.isprintable()):
            what = f"the environment variable {variable} is not set, or holds no key"
            raise EnvironmentFault(what)
        self._key = key
        self._limit = "max_tokens"  # or what the server asks for in its place
        self._in_flight = min(FIRST_IN_FLIGHT, server.concurrency)
        self.version = asyncio.run(self._version())

    def facts(self) -> base.EngineFacts:
        """Return what the log says: a server tells neither its precision nor its quantization."""
        return base.EngineFacts(engine=NAME, server=self.version)

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Generator[Completion]:
        """Yield completions as they arrive, as many requests in flight as the server is fast enough
        for, `concurrency` at most.
        """
        source = iter(requests)
        tasks: set[asyncio.Task[Completion]] = set()
        with asyncio.Runner() as runner:
            client = self._client()
            loop = runner.get_loop()
            try:
                while True:
                    free = max(0, self._in_flight - len(tasks))
                    for request in islice(source, free):
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

    async def _ask(
        self, client: openai.AsyncOpenAI, request: Request, sampling: Sampling
    ) -> Completion:
        """Return the completion of one request, or its error after the client's last attempt."""
        # of the whole reply: the client's timeout begins anew with each byte
        longest = (self.server.timeout_s + LONGEST_PAUSE_S) * (self.server.max_retries + 1)
        began = time.monotonic()
        try:
            async with asyncio.timeout(longest):
                reply = await self._send(client, request, sampling)
            # A slow server that is asked much at once passes the limit with every request, and
            # with every further attempt.
            if time.monotonic() - began < self.server.timeout_s / 4:
                self._in_flight = min(self._in_flight + 1, self.server.concurrency)
            return self._read(request, reply)
        except (self._openai.OpenAIError, TimeoutError, *_UNREADABLE) as error:
            if isinstance(error, self._openai.APITimeoutError | TimeoutError):
                self._in_flight = max(1, self._in_flight // 2)
            # in one line; a server may send the key back
            said = " ".join(str(error)[:3000].split()).replace(self._key, "***")
            reason = f"{self.server.address}: {valid_texts(said)[:300] or type(error).__name__}"
            refused = self._refusal(error)
            if refused is not None:
                return Completion(key=request.key, finish_reason=refused, refusal=reason)
            # the server's fault, or its key's, whichever model is asked
            is_down = isinstance(error, self._openai.APIConnectionError | TimeoutError)
            if isinstance(error, self._openai.APIStatusError):
                is_down = error.status_code >= 500 or error.status_code in (401, 429)
            return Completion(key=request.key, error=reason, is_down=is_down)

    def _refusal(self, error: Exception) -> str | None:
        """Why the server will never answer this request; None where the same may pass later, or
        where the fault is not the request's (a wrong key, an unknown model).
        """
        if not isinstance(error, self._openai.APIStatusError):
            return None
        said = f"{error} {error.body}"[:3000]
        code = error.status_code
        if code == 413 or (code in (400, 422) and _SAYS_TOO_LONG.search(said)):
            return TOO_LONG
        if code == 422 or (code in (400, 403, 451) and _SAYS_REFUSED.search(said)):
            return REFUSED
        return None

    async def _send(self, client: openai.AsyncOpenAI, request: Request, sampling: Sampling) -> Any:
        """Send what is rendered here as token ids or text, else messages."""
        settings: dict[str, Any] = {"model": self.model, "extra_body": self.server.extra_body}
        if request.ids:
            ours = _NEUTRAL | {"stop_token_ids": self.end_tokens}
            settings["extra_body"] = ours | self.server.extra_body
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
        model = self._model_of(reply)
        choice = reply.choices[0]
        message = getattr(choice, "message", None)
        text = (message.content or "") if message else choice.text
        finish = str(getattr(choice, "finish_reason", None) or "stop")
        if finish.lower() in _CUT_SHORT:
            raise ValueError(f"the server cut it short (finish_reason {finish})")
        if finish == _WITHHELD:
            refusal = f"{self.server.address}: finish_reason {finish}"
            return Completion(key=request.key, finish_reason=REFUSED, refusal=refusal, model=model)
        return Completion(
            key=request.key,
            text=valid_texts(text.strip()),
            finish_reason=valid_texts(finish),
            model=model,
        )

    def _model_of(self, reply: Any) -> str | None:
        """Return the name of the model in a reply, None where it has none."""
        model = getattr(reply, "model", None)
        if not isinstance(model, str) or not model:
            return None
        wanted = re.escape(self.model.rsplit("/", 1)[-1])
        if not re.search(rf"(?i)(^|/){wanted}(?![\w.])", model):
            raise ValueError(f"asked for '{self.model}', but '{model[:100]}' answered")
        return valid_texts(model[:200])


def _answered_by(section: ServerSection, name: str, weights: str | None) -> str:
    """Another server may hold other weights under the name; earlier results have no address."""
    address = [section.base_url] if section.base_url else []
    return hash_of(NAME, name, weights, section.extra_body, *address)


@contextmanager
def _opened(targets: Sequence[Target]) -> Iterator[base.EngineOf]:
    """Give what makes an engine; the server is somebody else's."""
    yield lambda section, target: ServerEngine(section, target.name, target.end_tokens())


ENGINE = base.EngineType(
    name=NAME,
    opened=_opened,
    answered_by=_answered_by,
    is_server=True,
    writes_json=True,
)
