"""`recipes chat RUN [RUN...]`: type a question, read what the base and each run answer."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.evals.engine import HFEngine, Request, Sampling
from recipes_lib.weights.runs import BASE, TRUST, Family, families, finished_run


def run(
    runs: Annotated[list[str], "finished runs"],
    *,
    prompt: Annotated[str | None, "answer this and stop, instead of asking for questions"] = None,
    system: Annotated[str | None, "system prompt, in place of the recipe's"] = None,
    max_new_tokens: Annotated[int, "longest answer (default 200)"] = 200,
    temperature: Annotated[float, "0 is greedy and repeatable (default)"] = 0.0,
    trust_remote_code: Annotated[bool, TRUST] = False,
    no_base: Annotated[bool, "leave the base's answer out"] = False,
) -> int:
    """Load every run once and answer until the input ends."""
    if not 0 <= temperature < float("inf"):
        raise RecipeError("recipes chat: --temperature must be 0 or more")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    trained = [finished_run(open_run(name), trust_remote_code) for name in runs]
    distinct = {run.run.path: run for run in trained}
    quiet_libraries()
    loaded = [Family(group) for group in families(list(distinct.values()))]
    begin: list[Message] = [{"role": "system", "content": system}] if system else []
    conversations = [  # each model reads its own earlier answers
        (family, name, list(begin))
        for family in loaded
        for name in family.names
        if not (no_base and name == BASE)
    ]
    for question in [prompt] if prompt is not None else _questions():
        for family, name, messages in conversations:
            messages.append({"role": "user", "content": question})
            text = answer(family, name, messages, sampling)
            messages.append({"role": "assistant", "content": text})
            recipe, title = family.recipe, name
            if name == BASE and len(loaded) > 1:
                form = f" in {recipe.base_format}" if recipe.base_format else ""
                title = f"{name} {recipe.model.name_or_path}{form}"
            say(f"{title}\n{text or '(empty answer)'}\n")
    return next_step("recipes", "export", runs[0], "--to", f"{trained[0].run.name}-export")


def answer(family: Family, name: str, messages: Sequence[Message], sampling: Sampling) -> str:
    """Return the next answer, asked in the run's prompt format (the base: as the first run)."""
    from recipes_lib.data.supervision import prompt_ids

    section, tokenizer = family.prompting(name)
    prompt = generation_prompt(section, tokenizer, messages=messages)
    ids, seed = tuple(prompt_ids(section, tokenizer, prompt)), random.getrandbits(31)
    engine = HFEngine(partial(family.answering, name), tokenizer, "")
    (done,) = engine.complete([Request(key=name, ids=ids, seed=seed)], sampling)
    if done.finish_reason == "prompt_too_long":
        raise RecipeError("the conversation is longer than the model can read: begin a new one")
    return done.text


def _questions() -> Iterator[str]:
    """Yield lines of the input until an empty one."""
    mark = "> " if sys.stdin.isatty() else ""
    if mark:
        say("type a question; an empty line or Ctrl-D ends")
    print(mark, end="", flush=True)
    while line := sys.stdin.readline().strip():
        yield line
        print(mark, end="", flush=True)
