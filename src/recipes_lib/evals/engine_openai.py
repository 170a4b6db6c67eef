"""The engine behind an OpenAI-compatible address: vLLM, SGLang, llama.cpp, a hosted API.

Connections, retries, Retry-After and timeouts are the `openai` client's. What cannot pass ends the
evaluation at once: a wrong key, address or model (401, 403, 404). A body that the server refuses
ends with its request (400, 402, 413, 422), and nothing that a server refuses is an answer.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import openai

from recipes_lib.core.errors import EnvironmentFault
from recipes_lib.core.files import hash_of, valid_texts
from recipes_lib.core.terminal import remember_secret
from recipes_lib.evals.engine import Completion, EvaluationIncomplete, Request, Sampling
from recipes_lib.evals.recipe import ServerSection

TOP_LOGPROBS = 20
LONGEST_PAUSE_S = 60.0  # the client follows a Retry-After of up to a minute
_BROKEN_OFF = ("abort", "aborted", "cancelled", "error")
_NO_LOGPROBS = (
    "judge.mode logits needs a server that continues the judge's turn and gives log-probabilities:"
    " set judge.mode: generate, or serve the judge with launch/vllm_server.sh"
)
_NO_SYSTEM = "a template without a system role (Gemma 2) needs judge.system_role: false"
_NO_TOKEN_IDS = (
    "prompts of a run go to /completions as token ids; a server that does not take them cannot"
    " answer for runs: serve the run with launch/vllm_server.sh, or set"
    " generation.engine=transformers"
)


class ServerFault(EvaluationIncomplete):
    """The server does not answer, refuses everything or is another one."""


class _Unusable(Exception):
    """A reply that cannot be read."""


class OpenAIEngine:
    """Answers through a server.

    Args:
        server: where and how to ask.
        model: the name it serves the model under.
        fingerprint: hash of the weights where they are known here; else the name stands for them.
        logprobs: ask for the probabilities of the first token instead of a text.

    Raises:
        EnvironmentFault: the server serves other models, or its key is not set.
        ServerFault: it does not answer, or refuses the key.
    """

    def __init__(
        self,
        server: ServerSection,
        model: str,
        fingerprint: str | None = None,
        logprobs: bool = False,
    ) -> None:
        self.server, self.model, self.logprobs = server, model, logprobs
        extra = [server.extra_body] if server.extra_body else []
        self.fingerprint = hash_of("openai", model, fingerprint, *extra)
        self._key = _key_of(server)
        self._limit = "max_tokens"  # or what the server asks for in its place
        self.version = asyncio.run(self._look())

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.server.address,
            api_key=self._key,
            timeout=self.server.timeout_s,
            max_retries=self.server.max_retries,
        )

    def complete(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they arrive, `concurrency` requests in flight.

        Raises:
            ServerFault: the server refuses the key, does not know the model, or answers as another
                one; with its own words.
        """
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
        """Return the completion of one request, or its error after the last attempt."""
        longest = (self.server.timeout_s + LONGEST_PAUSE_S / 4) * (self.server.max_retries + 1)
        reason = ""
        for _ in range(self.server.max_retries + 1):
            try:
                async with asyncio.timeout(longest):
                    return self._read(request, await self._post(client, request, sampling))
            except openai.APIStatusError as error:
                words = f"{error.status_code}: {_words(error)}"
                if error.status_code in (401, 403, 404):
                    hints = [*self._advice(request, error), "check base_url, model and key"]
                    what = f"{self.server.address} answered {words}"
                    raise ServerFault(what, *hints) from None
                refused = error.status_code < 500 and error.status_code not in (408, 409, 429)
                said = "; ".join([words, *self._advice(request, error)])
                return Completion(key=request.key, error=said, refused=refused)
            except TimeoutError:
                return Completion(key=request.key, error="no whole answer in time")
            except _Unusable as error:  # a busy server sends such a page once
                reason = str(error)
            except (openai.OpenAIError, OSError, ValueError, RecursionError) as error:
                cause = error.__cause__ or error
                reason = f"{type(cause).__name__}: {valid_texts(str(cause))[:200]}"
                if isinstance(error, openai.APIConnectionError):
                    break  # the client tried again already
        return Completion(key=request.key, error=reason)

    async def _post(self, client: openai.AsyncOpenAI, request: Request, sampling: Sampling) -> Any:
        """Send one request; a server that wants another name for the token limit gets it."""
        try:
            return await self._send(client, request, sampling)
        except openai.BadRequestError as error:
            if self._limit != "max_tokens" or "max_completion_tokens" not in _words(error):
                raise
            self._limit = "max_completion_tokens"
            return await self._send(client, request, sampling)

    async def _send(self, client: openai.AsyncOpenAI, request: Request, sampling: Sampling) -> Any:
        """Send token ids or text where the prompt is rendered here, messages where the server
        renders it.
        """
        settings: dict[str, Any] = {"model": self.model}
        extra = dict(self.server.extra_body)
        limit = 1 if self.logprobs else sampling.max_new_tokens
        if sampling.temperature is not None:
            settings["temperature"] = sampling.temperature
        if sampling.temperature != 0:
            settings |= {"top_p": sampling.top_p, "seed": request.seed % 2**31}
        if sampling.repetition_penalty != 1:
            extra.setdefault("repetition_penalty", sampling.repetition_penalty)
        if request.prompt is not None:
            settings |= {"logprobs": TOP_LOGPROBS} if self.logprobs else {}
            prompt: Any = list(request.ids) or request.prompt
            return await client.completions.create(
                prompt=prompt, max_tokens=limit, extra_body=extra, **settings
            )
        settings |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if self.logprobs else {}
        messages: Any = list(request.messages)
        if messages[-1]["role"] == "assistant":
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
        if request.schema is not None:
            verdict = {"name": "verdict", "schema": dict(request.schema), "strict": True}
            settings["response_format"] = {"type": "json_schema", "json_schema": verdict}
        settings[self._limit] = limit
        return await client.chat.completions.create(messages=messages, extra_body=extra, **settings)

    def _advice(self, request: Request, error: openai.APIStatusError) -> list[str]:
        """What to do about a refusal whose likely cause is known."""
        if error.status_code not in (400, 404, 405, 422):
            return []
        if request.ids:
            return [_NO_TOKEN_IDS]
        if self.logprobs:
            return [_NO_LOGPROBS]
        has_system = any(one["role"] == "system" for one in request.messages)
        return [_NO_SYSTEM] if has_system and error.status_code == 400 else []

    def _read(self, request: Request, reply: Any) -> Completion:
        """Read a reply of either endpoint; no text at all is an empty one, as of a model that
        declines.
        """
        name = getattr(reply, "model", None)
        if isinstance(name, str) and name and not is_version_of(name, self.model):
            raise ServerFault(
                f"{self.server.address} answered as '{valid_texts(name)[:100]}', not as"
                f" '{self.model}'",
                "is it another server? If the name stands for this model, set it as the name",
            )
        choices = getattr(reply, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise _Unusable(f"the reply has no choices: {valid_texts(str(reply))[:80]!r}")
        choice = choices[0]
        message = getattr(choice, "message", None)
        text = getattr(message, "content", None) if message else getattr(choice, "text", None)
        if isinstance(text, list):  # content in parts
            text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
        finish = getattr(choice, "finish_reason", None)
        if not (text is None or isinstance(text, str)):
            raise _Unusable(f"the reply's text is no text: {str(text)[:80]!r}")
        if isinstance(finish, str) and finish.lower() in _BROKEN_OFF:
            raise _Unusable(f"the server broke the reply off (finish_reason {finish})")
        tokens = getattr(getattr(reply, "usage", None), "completion_tokens", 0)
        return Completion(
            key=request.key,
            text=valid_texts(text or "").strip(),
            finish_reason=valid_texts(finish) if isinstance(finish, str) and finish else "stop",
            num_tokens=tokens if isinstance(tokens, int) and 0 <= tokens < 2**31 else 0,
            probabilities=_first_token(choice) if self.logprobs else None,
        )

    async def _look(self) -> str | None:
        """Make sure that the server is there and serves the model; return its version where it
        says one.
        """
        async with self._client() as client:
            try:
                listed = [model.id async for model in client.models.list()]
            except openai.NotFoundError:  # it has no list; the first request will show it
                return None
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                what = f"{self.server.address} refuses the key: {_words(error)}"
                raise ServerFault(what, f"check {self.server.api_key_variable}") from None
            except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
                what = f"{self.server.address} does not answer: {error.__cause__ or error}"
                hint = "start it (launch/vllm_server.sh), then run the same command to continue"
                raise ServerFault(what, hint) from None
            if self.model not in listed:
                what = f"{self.server.address} does not serve '{self.model}'"
                names = ", ".join(valid_texts(str(name)) for name in listed[:8])
                raise EnvironmentFault(what, f"it serves {names or 'nothing'}")
            try:  # vLLM's
                root = str(client.base_url).rstrip("/").removesuffix("/v1")
                found: Any = await client.with_options(max_retries=0).get(
                    f"{root}/version", cast_to=object
                )
                return str(found["version"])[:40]
            except (openai.OpenAIError, ValueError, TypeError, KeyError):
                return None


def _key_of(server: ServerSection) -> str:
    """Return the key from the environment; servers of one's own need none.

    Raises:
        EnvironmentFault: the variable is named and not set, or holds what no header can.
    """
    if not server.api_key_variable:
        return "none"
    value = os.environ.get(server.api_key_variable, "").strip()
    if not value:
        what = f"the environment variable {server.api_key_variable} is not set"
        raise EnvironmentFault(what, f"export {server.api_key_variable}=...")
    if not (value.isascii() and value.isprintable()):
        what = f"the environment variable {server.api_key_variable} has characters that no key has"
        raise EnvironmentFault(what)
    return remember_secret(value)  # a server may send it back in an error


def is_version_of(answered: str, asked: str) -> bool:
    """Return whether a reply's model is the one that was asked: its name, with or without owner, or
    a dated or tagged version of it.

    Example:
        >>> is_version_of("gpt-4o-2024-08-06", "gpt-4o"), is_version_of("other", "judge")
        (True, False)
    """
    names = [name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (answered, asked)]
    return names[0] == names[1] or names[0].startswith(tuple(f"{names[1]}{mark}" for mark in "-@:"))


def _first_token(choice: Any) -> dict[str, float]:
    """The likeliest first tokens with their probabilities."""
    logprobs = getattr(choice, "logprobs", None)
    try:
        if content := getattr(logprobs, "content", None):
            pairs = [(entry.token, entry.logprob) for entry in content[0].top_logprobs]
        else:
            pairs = list(logprobs.top_logprobs[0].items())  # type: ignore[union-attr]
        found = {
            str(token): math.exp(min(float(value), 0.0))
            for token, value in pairs
            if not math.isnan(float(value))
        }
    except (AttributeError, TypeError, IndexError, ValueError):
        found = {}
    if not found:
        raise _Unusable(f"the server gave no log-probabilities; {_NO_LOGPROBS}")
    return found


def _words(error: openai.APIError) -> str:
    """The server's own words, in one short line."""
    found: Any = error.body if error.body else error.message
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    text = found if isinstance(found, str) else json.dumps(found, default=str)
    return valid_texts(" ".join(text[:3000].split())[:300])
