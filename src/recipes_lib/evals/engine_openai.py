"""The engine behind an OpenAI-compatible address: vLLM, SGLang, llama.cpp, a hosted API.

Connections, retries, Retry-After and timeouts are the `openai` client's. What cannot pass ends the
evaluation at once: a wrong key, address or model (401, 403, 404). A body that the server refuses
ends with its request (400, 402, 413, 422), and nothing that a server refuses is an answer.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Generator, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from recipes_lib.core.errors import EnvironmentFault, one_line
from recipes_lib.core.files import hash_of, valid_texts
from recipes_lib.evals.engine import Completion, EvaluationIncomplete, HFEngine, Request, Sampling
from recipes_lib.evals.recipe import ServerSection

if TYPE_CHECKING:
    import openai

TOP_LOGPROBS = 20
LONGEST_PAUSE_S = 60.0  # the client follows a Retry-After of up to a minute
_NO_LOGPROBS = (
    "judge.mode logits needs a server that continues the judge's turn and gives log-probabilities:"
    " set judge.mode: generate"
)
_NO_TOKEN_IDS = (
    "a run's prompts go to /completions as token ids, which some servers do not take: serve the run"
    " with launch/vllm_server.sh, or set generation.engine=transformers"
)
# the client checks no types, so a reply may hold anything
_UNREADABLE = (AttributeError, TypeError, LookupError, ValueError, RecursionError)


def served_fingerprint(server: ServerSection, model: str, weights: str | None) -> str:
    """Return what the answers of a server are known by: the hash of the weights where they are
    known here, else the name they are served under.
    """
    return hash_of("openai", model, weights, *([server.extra_body] if server.extra_body else []))


class OpenAIEngine:
    """Answers through a server.

    Args:
        model: the name it serves the model under.
        fingerprint: `served_fingerprint` of the answers; a judge's are known by its own.
        logprobs: ask for the probabilities of the first token instead of a text.
    """

    def __init__(
        self,
        server: ServerSection,
        model: str,
        fingerprint: str = "",
        logprobs: bool = False,
    ) -> None:
        import openai  # half a second, which stored judgments do without

        self._openai = openai
        self.server, self.model, self.logprobs = server, model, logprobs
        self.fingerprint = fingerprint
        self._key = _key_of(server)
        self._limit = "max_tokens"  # or what the server asks for in its place
        self.version = asyncio.run(self._connect())

    def _client(self) -> openai.AsyncOpenAI:
        return self._openai.AsyncOpenAI(
            base_url=self.server.address,
            api_key=self._key,
            timeout=self.server.timeout_s,
            max_retries=self.server.max_retries,
        )

    async def _connect(self) -> str | None:
        """Make sure that the server serves the model; return its version, where it says one."""
        address = self.server.address
        async with self._client() as client:
            try:
                served = [str(model.id) async for model in client.models.list()]
            except self._openai.NotFoundError:  # it has no list; the first request will show it
                return None
            except (self._openai.OpenAIError, *_UNREADABLE) as error:
                hint = "start it (launch/vllm_server.sh), then run the same command to continue"
                if getattr(error, "status_code", 0) in (401, 403):
                    hint = f"check {self.server.api_key_variable or 'api_key_variable'}"
                what = f"{address} does not answer: {error.__cause__ or error}"
                raise EvaluationIncomplete(what, hint) from None
            if self.model not in served:
                what = f"{address} does not serve '{self.model}'"
                names = valid_texts(", ".join(served[:8])) or "nothing"
                raise EnvironmentFault(what, f"it serves {names}")
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
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        yield task.result()  # the answers before the fault that ends it all
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
        except self._openai.APIStatusError as error:
            body, status = error.body, error.status_code
            reason = body.get("message", body) if isinstance(body, dict) else body
            reason = " ".join(str(reason or error.message)[:3000].split())
            said = f"{status}: {valid_texts(reason)[:300]}"
            if status in (400, 404, 405, 422) and (request.ids or self.logprobs):
                said += f"; {_NO_TOKEN_IDS if request.ids else _NO_LOGPROBS}"
            if status in (401, 403, 404):
                what = f"{self.server.address} answered {said}"
                raise EvaluationIncomplete(what, "check base_url, model and key") from None
            refused = status < 500 and status not in (408, 409, 429)
            return Completion(key=request.key, error=said, refused=refused)
        except TimeoutError:
            return Completion(key=request.key, error="no whole reply in time")
        except self._openai.OpenAIError as error:
            return Completion(key=request.key, error=one_line(error))
        except _UNREADABLE as error:
            said = f"the reply cannot be read: {valid_texts(one_line(error))}"
            said += f"; {_NO_LOGPROBS}" if self.logprobs else ""
            return Completion(key=request.key, error=said)

    async def _send(self, client: openai.AsyncOpenAI, request: Request, sampling: Sampling) -> Any:
        """Send what is rendered here as token ids or text, else messages."""
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
        if request.messages[-1]["role"] == "assistant":
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
        if request.schema is not None:
            verdict = {"name": "verdict", "schema": dict(request.schema), "strict": True}
            settings["response_format"] = {"type": "json_schema", "json_schema": verdict}
        settings |= {"messages": list(request.messages), "extra_body": extra}
        create: Any = client.chat.completions.create
        try:
            return await create(**settings, **{self._limit: limit})
        except self._openai.BadRequestError as error:
            if self._limit != "max_tokens" or "max_completion_tokens" not in str(error.body):
                raise
            self._limit = "max_completion_tokens"
            return await create(**settings, **{self._limit: limit})

    def _read(self, request: Request, reply: Any) -> Completion:
        """Read a reply of either endpoint. No text is an empty one, as of a model that declines."""
        name = getattr(reply, "model", None)
        if isinstance(name, str) and name and not is_version_of(name, self.model):
            raise EvaluationIncomplete(
                f"{self.server.address} answered as '{valid_texts(name)[:100]}', not as"
                f" '{self.model}'",
                "is it another server? If the name stands for this model, set it as the name",
            )
        choice = reply.choices[0]
        message = getattr(choice, "message", None)
        text = (message.content if message else getattr(choice, "text", None)) or ""
        finish = str(getattr(choice, "finish_reason", None) or "stop")
        if finish.lower() in ("abort", "aborted", "cancelled", "error"):
            raise ValueError(f"the server cut it short (finish_reason {finish})")
        return Completion(
            key=request.key,
            text=valid_texts(text.strip()),
            finish_reason=valid_texts(finish),
            probabilities=_first_token(choice) if self.logprobs else None,
        )


Engine: TypeAlias = HFEngine | OpenAIEngine


def _key_of(server: ServerSection) -> str:
    """Return the key from the environment; servers of one's own need none."""
    name = server.api_key_variable
    value = os.environ.get(name, "").strip() if name else "none"
    if not (value and value.isascii() and value.isprintable()):
        what = f"the environment variable {name} is not set, or holds no key"
        raise EnvironmentFault(what, f"export {name}=...")
    return value


def is_version_of(answered: str, asked: str) -> bool:
    """Return whether a reply's model is the one that was asked, or a dated or tagged version.

    Example:
        >>> is_version_of("gpt-4o-2024-08-06", "gpt-4o"), is_version_of("other", "judge")
        (True, False)
    """
    name, wanted = (name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (answered, asked))
    return name == wanted or name.startswith((f"{wanted}-", f"{wanted}@", f"{wanted}:"))


def _first_token(choice: Any) -> dict[str, float]:
    """The likeliest first tokens with their probabilities, of either endpoint."""
    if content := getattr(choice.logprobs, "content", None):
        known = {entry.token: entry.logprob for entry in content[0].top_logprobs}
    else:
        known = choice.logprobs.top_logprobs[0]
    if not known:
        raise ValueError("no log-probabilities")
    return {str(token): math.exp(min(value, 0.0)) for token, value in known.items()}
