"""A judge that can be asked: a model in this process or behind a server.

In mode `logits` the verdict is the token after the lead-in `[RESULT]`, with which the judge's turn
starts.
"""

import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import ModelSection
from recipes_lib.core.errors import EnvironmentFault, RecipesError, one_line
from recipes_lib.core.files import hash_of, model_fingerprint
from recipes_lib.core.terminal import bare_address
from recipes_lib.data.conversations import Message
from recipes_lib.evals.asking import ServerGone
from recipes_lib.evals.engines import Engines
from recipes_lib.evals.engines.base import Completion, Engine, Request, Sampling, Target
from recipes_lib.evals.judgments import JudgeRequest
from recipes_lib.evals.log import JudgeFacts
from recipes_lib.evals.models import bare_recipe
from recipes_lib.evals.prompts import token_bound
from recipes_lib.evals.recipe import JudgeSection
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.load import free_memory, load_base, load_tokenizer, model_path

# the keys of a judge that decide what it says, beside its weights
_OF_ITS_MODEL = {"model", "revision", "dtype", "engine", "extra_body"}
_OF_ITS_TEXT = {"mode", "prompt_style", "temperature", "max_new_tokens"}
_JUDGE_START_S = 1800  # the limit of launch/with_judge.sh where JUDGE_START_S does not say another
_SCRIPT_ENDS_S = 60  # what the script may take beyond its limit, to stop the server and to end
_JUDGE_LOG_HINT = "the server's log stands beside the job's; run the same command to continue"
LEAD_IN = "[RESULT]"  # of mode logits: the judge's turn starts with it


class Judge:
    """A judge that can be asked.

    Attributes:
        fingerprint: hash of weights (or served model), decoding and verdict mode.
        weights: hash of its weights, None where they are not here.
        gone: why its server is not asked any more; stored judgments are still read.
    """

    def __init__(self, section: JudgeSection, fetch: bool = True) -> None:
        self.section = section
        self.weights: str | None = None
        self.gone: ServerGone | None = None
        model = ModelSection(
            name_or_path=section.model, revision=section.revision, dtype=section.dtype
        )
        self._recipe = bare_recipe(model)
        self._target = Target(
            name=section.model,
            recipe=self._recipe,
            load_tokenizer=lambda: self.tokenizer,
            using=self._using,
        )
        self._network: Any = None
        self._engines = Engines([self._target])
        self._engine: Engine | None = None
        if not section.is_served:
            if fetch and local_folder(self._recipe) is None:
                self.count_tokens("")  # which fetches it: the fingerprint has its commit
            self.weights = model_fingerprint(model_path(model), section.revision)
        self.fingerprint = hash_of(
            self.weights, section.model_dump(include=_OF_ITS_MODEL | _OF_ITS_TEXT)
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The judge's tokenizer; None where it is on the server's machine alone."""
        if not self.section.is_served:
            return load_tokenizer(self._recipe)
        # The server is not asked (/tokenize): what is cut, and so the key of a stored judgment,
        # would depend on whether it answers just now. An error is of a path on its machine, or of a
        # folder without a tokenizer.
        with suppress(RecipesError):
            if local_folder(self._recipe) is not None:
                return load_tokenizer(self._recipe)
        return None

    def facts(self) -> JudgeFacts:
        """Return what a log says about the judge."""
        section = self.section
        address = None
        if section.is_served:
            # as the recipe has it: with_judge.sh takes another port
            address = bare_address(str(section.base_url))
        return JudgeFacts(
            name=section.model,
            fingerprint=self.fingerprint,
            engine=section.engine,
            address=address,
            server=self._engine.facts().server if self._engine else None,
            weights=self.weights,
            model=section.model,
            mode=section.mode,
            weak=section.weak,
        )

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text; at most so many where only the server has the tokenizer."""
        if self.tokenizer is None:
            return token_bound(text)
        return len(self.tokenizer.encode(text))

    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        """Return the replies to requests of one kind as they arrive."""
        if self._engine is None:
            wanted = os.environ.get("RECIPES_JUDGE_WANTED")
            if wanted and self.section.served_here:
                _wait_for_server(Path(wanted))
            self._engine = self._engines.engine(self.section, self._target)
        if self.section.mode == "logits":
            weighed = list(requests)
            lead_ids, tokens = verdict_tokens(self.tokenizer, LEAD_IN, weighed[0].allowed)
            rendered = map(self._render, weighed)
            with_lead = [replace(request, ids=(*request.ids, *lead_ids)) for request in rendered]
            return self._engine.weigh(with_lead, tokens)
        limit = self.section.max_new_tokens
        sampling = Sampling(max_new_tokens=limit, temperature=self.section.temperature)
        return self._engine.complete(map(self._render, requests), sampling)

    def close(self) -> None:
        """Let go of its weights, or of its server."""
        self._engine = None
        self._network = None
        self._engines.close()
        free_memory()

    @contextmanager
    def _using(self) -> Iterator[Any]:
        """Give its network in this process."""
        if self._network is None:
            self._network = ready_to_answer(load_base(self._recipe, self.tokenizer))
        yield self._network

    def _render(self, request: JudgeRequest) -> Request:
        """Return a request as its engine takes it: ids here, text or a message for a server."""
        key = request.row["key"]
        ids: list[int] = []
        if self.section.prompt_style == "prometheus":
            text = f"[INST] {request.prompt} [/INST]"
            if not self.section.is_served:
                ids = self.tokenizer.encode(text)
            return Request(key=key, prompt=text, ids=tuple(ids))
        # some templates have no system role
        message = Message(role="user", content=request.prompt)
        if not self.section.is_served:
            try:
                ids = self.tokenizer.apply_chat_template(
                    (message,), add_generation_prompt=True, return_dict=False
                )
            except Exception as error:  # templates raise what they like
                what = f"the judge's chat template refuses the prompt: {one_line(error)}"
                hint = "a judge without a chat template: judge.prompt_style: prometheus"
                raise EnvironmentFault(what, hint) from None
        schema: dict[str, Any] | None = None
        if self.section.mode == "json":
            result = {"type": "string", "enum": list(request.allowed)}
            schema = {
                "type": "object",
                "properties": {"feedback": {"type": "string"}, "result": result},
                "required": ["feedback", "result"],
                "additionalProperties": False,
            }
        return Request(key=key, messages=(message,), ids=tuple(ids), schema=schema)


def _wait_for_server(wanted: Path) -> None:
    """Ask launch/with_judge.sh for the judge's server, and return once it answers; an error where
    the script ended, or gave no answer within its own limit (JUDGE_START_S).
    """
    answers = wanted.with_name(f"{wanted.name}.answers")
    limit = float(os.environ.get("JUDGE_START_S", _JUDGE_START_S)) + _SCRIPT_ENDS_S
    wanted.touch()
    end = time.monotonic() + limit
    while not answers.exists():
        # the script removes the file when it ends
        if not wanted.exists():
            what = "launch/with_judge.sh ended before the judge's server answered"
            raise EnvironmentFault(what, _JUDGE_LOG_HINT)
        if time.monotonic() > end:
            what = f"launch/with_judge.sh started no judge that answers within {limit:.0f} s"
            raise EnvironmentFault(what, _JUDGE_LOG_HINT)
        time.sleep(0.1)


def opened(section: JudgeSection) -> closing[Judge]:
    """Give a judge as a context, after which its memory is free again."""
    return closing(Judge(section))


def verdict_tokens(
    tokenizer: Any, lead_in: str, allowed: Sequence[str]
) -> tuple[list[int], dict[str, int]]:
    """Return the lead-in's token ids and, per verdict, the token that means it.

    A verdict follows after a space. Where the tokenizer makes the space a token of its own, before
    digits for example, or merges it with some verdicts only, it becomes part of the lead-in.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    spaced = {verdict: encode(f"{lead_in} {verdict}") for verdict in allowed}
    # the first place at which they differ; 0 where they do not before the shortest ends
    columns = enumerate(zip(*spaced.values(), strict=False))
    common = next((place for place, tokens in columns if len(set(tokens)) > 1), 0)
    lead_ids = spaced[allowed[0]][:common]
    tokens = {verdict: ids[common] for verdict, ids in spaced.items()}
    if len(set(tokens.values())) < len(allowed):
        lead_ids = encode(f"{lead_in} ")
        tokens = {verdict: encode(verdict)[0] for verdict in allowed}
    if len(set(tokens.values())) < len(allowed):
        what = f"this judge's tokenizer has no single token for each of {', '.join(allowed)}"
        raise EnvironmentFault(what, "set judge.mode: generate")
    return lead_ids, tokens
