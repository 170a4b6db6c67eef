"""The engine behind an OpenAI-compatible address: vLLM, llama.cpp, SGLang, a hosted API.

Requests are in flight together up to a limit. What may pass - 429, 5xx, a timeout, a dropped connection, an answer that is no JSON -
is tried again a bounded number of times, after the pause the server asks for. What cannot pass ends at once: a wrong key or address
with everything (401, 403, 404), a refused body with its request (400). Each attempt has a time limit of its own, which a server that
drips its answer byte by byte does not escape.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_lib.errors import EnvironmentFault, ExitCode, RecipesError
from recipes_lib.generation.engine import Completion, Decoding, Request
from recipes_lib.generation.fingerprints import hash_of

MAX_PAUSE_S = 120.0
TOP_LOGPROBS = 20
_PASSING = {408, 409, 429}
_HOPELESS = {401, 403, 404}


class ServerUnreachable(RecipesError):
    """The server did not answer, after all attempts; the same command continues the evaluation."""

    exit_code = ExitCode.EVALUATION_INCOMPLETE


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where and how to ask. `first_pause_s` is the pause before the first further attempt; it doubles with each."""

    base_url: str
    model: str
    api_key_variable: str | None = None
    concurrency: int = 16
    timeout_s: float = 120.0
    max_retries: int = 5
    first_pause_s: float = 0.5

    def key(self) -> str:
        """Return the key from the environment; servers of one's own need none.

        Raises:
            EnvironmentFault: the variable is named and not set.
        """
        if not self.api_key_variable:
            return "none"
        value = os.environ.get(self.api_key_variable)
        if not value:
            raise EnvironmentFault(f"the environment variable {self.api_key_variable} is not set", f"export {self.api_key_variable}=...")
        return value


class OpenAIEngine:
    """Answers through a server.

    Args:
        server: where and how.
        fingerprint: hash of the weights where they are known here; absent, the served name stands for them.
        logprobs: ask for the probabilities of the first token instead of a text.

    Raises:
        EnvironmentFault: the server serves other models, or refuses the key.
        ServerUnreachable: the server does not answer.
    """

    def __init__(self, server: Server, fingerprint: str | None = None, logprobs: bool = False) -> None:
        self.server, self.logprobs = server, logprobs
        self.fingerprint = hash_of("openai", server.model, fingerprint)
        self.retries = 0
        self._api_key = server.key()
        asyncio.run(self._check_served())

    def complete(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Completion]:
        """Yield completions as they arrive.

        Raises:
            EnvironmentFault: the server refuses the key or does not know the model; with its own words.
        """
        arrived: queue.Queue[Completion | BaseException] = queue.Queue()
        stop = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._run(requests, decoding, arrived, stop)), daemon=True)
        thread.start()
        try:
            for _ in requests:
                item = arrived.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    async def _run(self, requests: Sequence[Request], decoding: Decoding, arrived: queue.Queue[Any], stop: threading.Event) -> None:
        """Ask all requests, at most `concurrency` at once."""
        gate = asyncio.Semaphore(self.server.concurrency)
        async with self._client() as client:

            async def one(request: Request) -> None:
                async with gate:
                    if not stop.is_set():
                        arrived.put(await self._ask(client, request, decoding))

            tasks = [asyncio.create_task(one(request)) for request in requests]
            while tasks and not stop.is_set():
                done, pending = await asyncio.wait(tasks, timeout=0.2)
                tasks = list(pending)
                for task in done:
                    if fault := task.exception():
                        arrived.put(fault)
                        stop.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: Any, request: Request, decoding: Decoding) -> Completion:
        """Return the completion of one request, or its error after the last attempt."""
        import openai

        reason = ""
        for attempt in range(self.server.max_retries + 1):
            pause = min(self.server.first_pause_s * 2**attempt, MAX_PAUSE_S) * random.uniform(0.75, 1.25)
            try:
                reply = await asyncio.wait_for(self._post(client, request, decoding), self.server.timeout_s)
                return _completion(request, reply, self.logprobs)
            except openai.APIStatusError as error:
                body = _body(error)
                if error.status_code in _HOPELESS:
                    raise EnvironmentFault(
                        f"{self.server.base_url} answered {error.status_code}: {body}", "check base_url, model and key"
                    ) from None
                if error.status_code not in _PASSING and error.status_code < 500:
                    return Completion(key=request.key, error=f"{error.status_code}: {body}", permanent=True)
                reason = f"{error.status_code}: {body}"
                pause = retry_after(error.response.headers) or pause
            except TimeoutError:
                reason = f"no answer within {self.server.timeout_s:g} s"
            except (openai.OpenAIError, json.JSONDecodeError, AttributeError, IndexError, TypeError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.server.max_retries:
                self.retries += 1
                await asyncio.sleep(pause)
        return Completion(key=request.key, error=reason)

    async def _post(self, client: Any, request: Request, decoding: Decoding) -> Any:
        """Send one attempt: token ids or text where the prompt is rendered here, messages where the server renders it."""
        settings: dict[str, Any] = {"model": self.server.model, "temperature": decoding.temperature}
        settings |= {"max_tokens": 1 if self.logprobs else decoding.max_new_tokens}
        if decoding.temperature > 0:
            settings |= {"top_p": decoding.top_p, "seed": request.seed % 2**31}
        extra: dict[str, Any] = {} if decoding.repetition_penalty == 1 else {"repetition_penalty": decoding.repetition_penalty}
        if request.prompt is not None:
            settings |= {"logprobs": TOP_LOGPROBS} if self.logprobs else {}
            return await client.completions.create(prompt=list(request.ids) or request.prompt, extra_body=extra, **settings)
        settings |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if self.logprobs else {}
        if request.messages and request.messages[-1]["role"] == "assistant":
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
        return await client.chat.completions.create(messages=list(request.messages), extra_body=extra, **settings)

    async def _check_served(self) -> None:
        """Make sure that the server is there and serves the model.

        Raises:
            EnvironmentFault: it serves others, or refuses the key.
            ServerUnreachable: it does not answer, after all attempts.
        """
        import openai

        reason = ""
        async with self._client() as client:
            for attempt in range(self.server.max_retries + 1):
                try:
                    page = await asyncio.wait_for(client.models.list(), self.server.timeout_s)
                    served = [model.id for model in page.data]
                    break
                except openai.APIStatusError as error:
                    reason = f"{error.status_code}: {_body(error)}"
                    if error.status_code in (401, 403):
                        raise EnvironmentFault(
                            f"{self.server.base_url} refuses the key: {reason}", f"check {self.server.api_key_variable}"
                        ) from None
                    if error.status_code == 404:  # a server without the list; the first request will tell
                        return
                except (openai.OpenAIError, TimeoutError, ValueError, AttributeError, TypeError) as error:
                    reason = f"{type(error).__name__}: {error}"
                if attempt < self.server.max_retries:
                    await asyncio.sleep(min(self.server.first_pause_s * 2**attempt, MAX_PAUSE_S))
            else:
                raise ServerUnreachable(
                    f"{self.server.base_url} does not answer: {reason}",
                    "start it (launch/vllm_server.sh), then run the same command to continue",
                )
        if self.server.model not in served:
            raise EnvironmentFault(
                f"{self.server.base_url} does not serve '{self.server.model}'", f"it serves {', '.join(served[:8]) or 'nothing'}"
            )

    def _client(self) -> Any:
        import openai

        return openai.AsyncOpenAI(base_url=self.server.base_url, api_key=self._api_key, max_retries=0, timeout=self.server.timeout_s)


def _completion(request: Request, reply: Any, logprobs: bool) -> Completion:
    """Read a reply of either endpoint."""
    choice = reply.choices[0]
    message = getattr(choice, "message", None)
    text = (choice.text if message is None else message.content) or ""
    found = _first_token(choice) if logprobs else None
    used = getattr(reply, "usage", None)
    tokens = int(getattr(used, "completion_tokens", 0) or 0)
    return Completion(key=request.key, text=text.strip(), finish_reason=choice.finish_reason or "stop", num_tokens=tokens, logprobs=found)


def _first_token(choice: Any) -> dict[str, float]:
    """The likeliest first tokens with their log-probabilities."""
    content = getattr(choice.logprobs, "content", None)
    if content:
        return {entry.token: entry.logprob for entry in content[0].top_logprobs}
    return dict(choice.logprobs.top_logprobs[0])


def _body(error: Any) -> str:
    """The server's own words, in one short line."""
    body = error.body if error.body is not None else getattr(error.response, "text", "")
    if isinstance(body, Mapping):
        body = body.get("message") or body
    return " ".join(str(body).split())[:300]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the pause in seconds that a Retry-After header asks for, at most two minutes; None without one.

    Example:
        >>> retry_after({"retry-after": "3"})
        3.0
    """
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), MAX_PAUSE_S)
