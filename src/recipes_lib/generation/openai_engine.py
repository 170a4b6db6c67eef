"""The engine behind an OpenAI-compatible address: vLLM, llama.cpp, SGLang, a hosted API.

Requests are in flight together up to a limit, which a server that has too much lowers (429, 503, a
refused connection, no answer in time) and answers raise again. What may pass - 429, 5xx, a timeout,
a dropped connection, an answer that is no JSON - is tried again a bounded number of times, after
the pause the server asks for. What cannot pass ends at once: a wrong key, address or model with
everything (401, 403, 404), a refused body with its request (400, 402, 413, 422). Nothing that a
server refuses is an answer. Each attempt has a time limit of its own, which a server that drips its
answer byte by byte does not escape, and a reply a size limit, which one that grows on unpacking
does not escape. No byte of a reply ends more than that reply, one that the server broke off is
none, and no redirect is followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import json
import math
import os
import queue
import random
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipesError
from recipes_lib.core.fingerprints import hash_of
from recipes_lib.core.json_files import valid_text
from recipes_lib.engine import Completion, Decoding, Request

MAX_PAUSE_S = 120.0
MAX_REPLY_BYTES = 4 << 20  # an answer takes kilobytes
TOP_LOGPROBS = 20
_PASSING = {408, 409, 429}
_TOO_MUCH = {429, 503}
_HOPELESS = {401, 403, 404}
_BROKEN_OFF = {
    "abort",
    "aborted",
    "cancelled",
    "error",
}  # finish reasons of a reply that the server did not finish


class ServerFault(RecipesError):
    """The server does not answer, refuses everything or is another one; what is missing is asked
    again by the same command.
    """

    exit_code = ExitCode.EVALUATION_INCOMPLETE


class _Refused(Exception):
    """An HTTP status of 300 or above."""

    def __init__(self, status: int, words: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"{status}: {words}")
        self.status, self.headers = status, headers


class _Unusable(Exception):
    """A reply that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where and how to ask. `first_pause_s` is the pause before the first further attempt; it
    doubles with each.
    """

    base_url: str
    model: str
    api_key_variable: str | None = None
    concurrency: int = 256
    timeout_s: float = 120.0
    max_retries: int = 5
    first_pause_s: float = 0.5

    def key(self) -> str:
        """Return the key from the environment; servers of one's own need none.

        Raises:
            EnvironmentFault: the variable is named and not set, or holds what no header can.
        """
        if not self.api_key_variable:
            return "none"
        value = os.environ.get(self.api_key_variable, "").strip()
        if not value:
            raise EnvironmentFault(
                f"the environment variable {self.api_key_variable} is not set",
                f"export {self.api_key_variable}=...",
            )
        if not (value.isascii() and value.isprintable()):
            raise EnvironmentFault(
                f"the environment variable {self.api_key_variable} holds no key: it has characters"
                " that no key has"
            )
        return value


class OpenAIEngine:
    """Answers through a server.

    Args:
        server: where and how.
        fingerprint: hash of the weights where they are known here; absent, the served name stands
            for them.
        logprobs: ask for the probabilities of the first token instead of a text.

    Raises:
        EnvironmentFault: the server serves other models.
        ServerFault: the server does not answer, or refuses the key.
    """

    def __init__(
        self, server: Server, fingerprint: str | None = None, logprobs: bool = False
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise EnvironmentFault(
                f"a server cannot be asked: {error}", "pip install -e '.[eval]'"
            ) from None

        self._faults = (
            httpx2.HTTPError,
            httpx2.InvalidURL,
            httpx2.StreamError,
            OSError,
            ValueError,
            _Unusable,
        )
        self._not_taken = httpx2.ConnectError
        self.server, self.logprobs = server, logprobs
        self.fingerprint = hash_of("openai", server.model, fingerprint)
        self.retries = 0
        self._api_key = server.key()
        self._allowed = float(
            server.concurrency
        )  # in flight; too much for the server lowers it, answers raise it again
        self._lowered = 0.0
        self._answered = 0
        asyncio.run(self._check_served())

    def complete(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Yield completions as they arrive. Requests are taken as there is room for them, a few
        ahead, so that none waits for another.

        Raises:
            ServerFault: the server refuses the key, does not know the model, or answers as another
                one; with its own words.
        """
        source, loop = iter(requests), asyncio.new_event_loop()
        arrived: queue.Queue[Completion | BaseException] = queue.Queue()
        given: asyncio.Queue[Request | None] = asyncio.Queue()
        stop = threading.Event()

        def ask_all() -> None:
            try:
                with asyncio.Runner(loop_factory=lambda: loop) as runner:
                    runner.run(self._run(given, decoding, arrived, stop))
            except BaseException as fault:  # for the thread that waits
                arrived.put(fault)

        def give(number: int) -> int:
            """Give the engine's thread as many requests, or those that there are."""
            taken = 0
            for request in itertools.islice(source, number):
                hand(request)
                taken += 1
            if taken < number:
                hand(None)
            return taken

        def hand(request: Request | None) -> None:
            with contextlib.suppress(RuntimeError):  # it ended with a fault, which has arrived
                loop.call_soon_threadsafe(given.put_nowait, request)

        thread = threading.Thread(target=ask_all, daemon=True)
        thread.start()
        try:
            missing = give(2 * self.server.concurrency)
            while missing:
                item = arrived.get()
                if isinstance(item, BaseException):
                    raise item
                missing += give(1) - 1
                yield item
        finally:
            stop.set()
            thread.join()

    async def _run(
        self,
        given: asyncio.Queue[Request | None],
        decoding: Decoding,
        arrived: queue.Queue[Any],
        stop: threading.Event,
    ) -> None:
        """Ask what is given until None is, at most `concurrency` at once."""
        self._turn, self._in_flight = asyncio.Condition(), 0
        async with self._client() as client:

            async def work() -> None:
                while (request := await given.get()) is not None:
                    arrived.put(await self._ask(client, request, decoding))
                given.put_nowait(None)  # for the next worker

            tasks = [asyncio.create_task(work()) for _ in range(self.server.concurrency)]
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
        reason, attempt, busy = "", 0, 0
        while True:
            too_much = False  # the server takes requests, but not this one now
            pause = min(
                self.server.first_pause_s * 2 ** (attempt + min(busy, 5)), MAX_PAUSE_S
            ) * random.uniform(0.75, 1.25)
            answered = self._answered
            try:
                async with self._slot():
                    reply = await asyncio.wait_for(
                        self._post(client, request, decoding), self.server.timeout_s
                    )
                self._check_model(reply)
                done = _completion(request, reply, self.logprobs)
                self._answered += 1
                self._allowed = min(float(self.server.concurrency), self._allowed + 0.1)
                return done
            except _Refused as error:
                if error.status in _HOPELESS:
                    raise ServerFault(
                        f"{self.server.base_url} answered {error}",
                        *self._advice(request, error.status),
                        "check base_url, model and key",
                    ) from None
                if error.status not in _PASSING and error.status < 500:
                    return Completion(
                        key=request.key,
                        error="; ".join([str(error), *self._advice(request, error.status)]),
                        refused=True,
                    )
                reason, pause = str(error), retry_after(error.headers) or pause
                too_much = error.status in _TOO_MUCH
            except TimeoutError:
                reason = f"no answer within {self.server.timeout_s:g} s"
                self._lower()  # it may have waited behind the others; it counts, it was taken
            except self._faults as error:
                too_much = isinstance(error, self._not_taken)
                reason = (
                    str(error)
                    if isinstance(error, _Unusable)
                    else f"{type(error).__name__}: {error}"
                )
            if too_much:
                self._lower()
            if too_much and self._answered > answered:  # the server works
                busy += 1
            else:
                attempt += 1
            if attempt > self.server.max_retries:
                return Completion(key=request.key, error=reason)
            self.retries += 1
            await asyncio.sleep(pause)

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """Wait until one more may be in flight, and be it."""
        async with self._turn:
            await self._turn.wait_for(lambda: self._in_flight < max(1, int(self._allowed)))
            self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            async with self._turn:
                self._turn.notify(2)  # the one that ended, and one more where the limit rose

    def _lower(self) -> None:
        """Halve what may be in flight, once for a burst of refusals."""
        now = time.monotonic()
        if now - self._lowered > self.server.first_pause_s:
            self._allowed, self._lowered = max(1.0, self._allowed / 2), now

    def _advice(self, request: Request, status: int) -> list[str]:
        """What to do about a refusal whose likely cause is known."""
        if request.ids and status in (400, 404, 405, 422):
            return [
                "prompts of a run go to /completions as token ids, and a server that does not take"
                " them (transformers serve) cannot answer for runs: serve the run with"
                " launch/vllm_server.sh, or answer in this process (generation.engine=transformers)"
            ]
        if self.logprobs and status in (400, 404, 405, 422):
            return [
                "judge.mode logits needs a server that continues the judge's turn and gives"
                " log-probabilities (vLLM; transformers serve does not): set judge.mode: generate,"
                " or serve the judge with launch/vllm_server.sh"
            ]
        return []

    def _check_model(self, reply: Mapping[str, Any]) -> None:
        """Make sure that the model which was asked answered."""
        name = reply.get("model")
        if isinstance(name, str) and name and not is_version_of(name, self.server.model):
            raise ServerFault(
                f"{self.server.base_url} answered as '{valid_text(name)[:100]}', not as"
                f" '{self.server.model}'",
                "is it another server? If the name stands for this model, write the name it answers"
                " with",
            )

    async def _post(self, client: Any, request: Request, decoding: Decoding) -> dict[str, Any]:
        """Send one attempt: token ids or text where the prompt is rendered here, messages where the
        server renders it.
        """
        body: dict[str, object] = {"model": self.server.model, "temperature": decoding.temperature}
        body |= {"max_tokens": 1 if self.logprobs else decoding.max_new_tokens}
        if decoding.temperature > 0:
            body |= {"top_p": decoding.top_p, "seed": request.seed % 2**31}
        body |= (
            {}
            if decoding.repetition_penalty == 1
            else {"repetition_penalty": decoding.repetition_penalty}
        )
        if request.prompt is not None:
            body |= {"prompt": list(request.ids) or request.prompt} | (
                {"logprobs": TOP_LOGPROBS} if self.logprobs else {}
            )
            return await self._call(client, "POST", "completions", body)
        body |= {"messages": list(request.messages)} | (
            {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if self.logprobs else {}
        )
        if request.messages and request.messages[-1]["role"] == "assistant":
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return await self._call(client, "POST", "chat/completions", body)

    async def _call(
        self, client: Any, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send one request and return the JSON object of its reply."""
        content = bytearray()
        sent = None if body is None else json.dumps(body).encode()
        async with client.stream(
            method, f"{self.server.base_url.rstrip('/')}/{path}", content=sent
        ) as response:
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    raise _Unusable(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB")
        if 300 <= response.status_code < 400:  # not followed: whoever is there was not asked for
            place = valid_text(response.headers.get("location", "nowhere"))[:200]
            raise _Refused(
                response.status_code,
                f"it sends requests on to {place}: if that is the server, set base_url to it",
                {},
            )
        text = _unpacked(
            bytes(content), response.headers.get("content-encoding", "").strip().lower()
        ).decode("utf-8", "replace")
        try:
            found = json.loads(
                text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits)
            )
        except (ValueError, RecursionError):
            found = text
        if response.status_code >= 400:
            raise _Refused(response.status_code, _words(found), response.headers)
        if not isinstance(found, dict):
            raise _Unusable(f"the reply is no JSON object: {_words(found)[:80]!r}")
        return found

    async def _check_served(self) -> None:
        """Make sure that the server is there and serves the model."""
        reason = ""
        async with self._client() as client:
            for attempt in range(self.server.max_retries + 1):
                try:
                    page = await asyncio.wait_for(
                        self._call(client, "GET", "models"), self.server.timeout_s
                    )
                    served = [valid_text(str(model["id"])) for model in page["data"]]
                    break
                except _Refused as error:
                    reason = str(error)
                    if error.status in (401, 403):
                        raise ServerFault(
                            f"{self.server.base_url} refuses the key: {reason}",
                            f"check {self.server.api_key_variable}",
                        ) from None
                    if (
                        error.status == 404
                    ):  # a server without the list; the first request will tell
                        return
                except TimeoutError:
                    reason = f"no answer within {self.server.timeout_s:g} s"
                except (*self._faults, KeyError, TypeError) as error:
                    reason = f"{type(error).__name__}: {error}"
                if attempt < self.server.max_retries:
                    await asyncio.sleep(min(self.server.first_pause_s * 2**attempt, MAX_PAUSE_S))
            else:
                raise ServerFault(
                    f"{self.server.base_url} does not answer: {reason}",
                    "start it (launch/vllm_server.sh), then run the same command to continue",
                )
        if self.server.model not in served:
            raise EnvironmentFault(
                f"{self.server.base_url} does not serve '{self.server.model}'",
                f"it serves {', '.join(served[:8]) or 'nothing'}",
            )

    def _client(self) -> Any:
        """The HTTP client; it asks for replies that are not packed."""
        import httpx2

        headers = {
            "Authorization": f"Bearer {self._api_key}",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
        }
        limits = httpx2.Limits(
            max_connections=self.server.concurrency,
            max_keepalive_connections=self.server.concurrency,
        )
        return httpx2.AsyncClient(headers=headers, limits=limits, timeout=self.server.timeout_s)


def is_version_of(answered: str, asked: str) -> bool:
    """Return whether a reply's model is the one that was asked: its name, with or without owner, or
    a dated or tagged version of it.

    Example:
        >>> is_version_of("gpt-4o-2024-08-06", "gpt-4o"), is_version_of("org/judge@main", "org/judge"), is_version_of("other", "judge")
        (True, True, False)
    """  # noqa: E501
    names = [name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (answered, asked)]
    return names[0] == names[1] or names[0].startswith(tuple(f"{names[1]}{mark}" for mark in "-@:"))


def _unpacked(content: bytes, encoding: str) -> bytes:
    """The content of a reply that was packed although nobody asked for it."""
    if encoding in ("", "identity"):
        return content
    if encoding not in ("gzip", "deflate"):
        raise _Unusable(f"the reply is packed with {encoding}, which nobody asked for")
    try:
        plain = zlib.decompressobj(wbits=47).decompress(content, MAX_REPLY_BYTES + 1)
    except zlib.error as error:
        raise _Unusable(f"the reply cannot be unpacked: {error}") from None
    if len(plain) > MAX_REPLY_BYTES:
        raise _Unusable(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB when unpacked")
    return plain


def _completion(request: Request, reply: Mapping[str, Any], logprobs: bool) -> Completion:
    """Read a reply of either endpoint; no text at all is an empty one, as of a model that declines
    or calls a tool.
    """
    choices = reply.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise _Unusable(f"the reply has no choices: {_words(reply)[:80]!r}")
    choice = choices[0]
    message = choice.get("message")
    said = message.get("content") if isinstance(message, dict) else choice.get("text")
    if isinstance(said, list):  # content in parts
        said = "".join(str(part.get("text") or "") for part in said if isinstance(part, dict))
    finish, usage = choice.get("finish_reason"), reply.get("usage")
    if not (said is None or isinstance(said, str)):
        raise _Unusable(f"the reply's text is no text: {_words(said)[:80]!r}")
    if isinstance(finish, str) and finish.lower() in _BROKEN_OFF:
        raise _Unusable(f"the server broke the reply off (finish_reason {finish})")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    return Completion(
        key=request.key,
        text=valid_text(said).strip() if isinstance(said, str) else "",
        finish_reason=valid_text(finish) if isinstance(finish, str) and finish else "stop",
        num_tokens=int(tokens) if isinstance(tokens, int | float) and 0 <= tokens < 2**31 else 0,
        probabilities=_first_token(choice) if logprobs else None,
    )


def _first_token(choice: Mapping[str, Any]) -> dict[str, float]:
    """The likeliest first tokens with their probabilities."""
    found: dict[str, float] = {}
    try:
        logprobs = choice["logprobs"]
        if logprobs.get("content"):
            pairs = [
                (entry["token"], entry["logprob"])
                for entry in logprobs["content"][0]["top_logprobs"]
            ]
        else:
            pairs = list(logprobs["top_logprobs"][0].items())
        found = {
            str(token): math.exp(min(float(value), 0.0))
            for token, value in pairs
            if not math.isnan(float(value))
        }
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        pass
    if not found:
        raise _Unusable(
            "the server gave no log-probabilities: set judge.mode: generate, or serve the judge"
            " with launch/vllm_server.sh"
        )
    return found


def _words(found: Any) -> str:
    """The server's own words, in one short line."""
    for name in ("error", "message", "detail"):
        if isinstance(found, Mapping) and found.get(name):
            found = found[name]
    return valid_text(" ".join(str(found)[:3000].split())[:300])


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the pause in seconds that a Retry-After header asks for, at most two minutes; None
    without one.

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
