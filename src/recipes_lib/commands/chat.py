"""`recipes chat`: ask runs and their base, side by side."""

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.evals.engines.base import TOO_LONG, Request, Sampling
from recipes_lib.evals.engines.transformers import TransformersEngine
from recipes_lib.weights.runs import BASE, TRUST, Family, families, finished_run


def run_chat(
    runs: Annotated[list[str], "finished runs"],
    *,
    prompt: Annotated[str | None, "answer this question and exit"] = None,
    system: Annotated[str | None, "system prompt, in place of the recipe's"] = None,
    max_new_tokens: Annotated[int, "longest answer (default 200)"] = 200,
    temperature: Annotated[float, "0 is greedy and repeatable (default)"] = 0.0,
    trust_remote_code: Annotated[bool, TRUST] = False,
) -> int:
    """Load every run once and answer until the input ends."""
    if not 0 <= temperature < math.inf:
        raise RecipeError("recipes chat: --temperature must be 0 or more")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    trained = [finished_run(open_run(name), trust_remote_code) for name in dict.fromkeys(runs)]
    quiet_libraries()
    loaded = [Family(group) for group in families(trained)]
    conversations: list[Conversation] = []
    for family in loaded:
        for name in family.names:
            title = name
            if name == BASE and len(loaded) > 1:  # several: by its name, and how it is asked
                title = f"{BASE} {family.recipe.model.name_or_path}"
                if family.recipe.base_format:
                    title += f" in {family.recipe.base_format}"
            conversations.append(Conversation(family=family, name=name, title=title))
            if system:
                conversations[-1].messages.append({"role": "system", "content": system})

    questions = _typed_questions() if prompt is None else [prompt]
    for question in questions:
        for conversation in conversations:
            text = conversation.ask(question, sampling)
            say(f"{conversation.title}\n{text or '(empty answer)'}\n")
    return next_step("export", runs[0], "--to", f"{trained[0].run.name}-export")


@dataclass
class Conversation:
    """A conversation with one model, which reads its own earlier answers and no other's."""

    family: Family
    name: str  # of the run, or `base`
    title: str
    messages: list[Message] = field(default_factory=list)

    def ask(self, question: str, sampling: Sampling) -> str:
        """Return the answer, asked in the run's prompt format (the base: as the first run)."""
        from recipes_lib.data.encoding import prompt_ids

        self.messages.append({"role": "user", "content": question})
        section, tokenizer = self.family.prompting(self.name)
        prompt = generation_prompt(section, tokenizer, messages=self.messages)
        request = Request(
            key=self.name,
            ids=tuple(prompt_ids(section, tokenizer, prompt)),
            seed=random.getrandbits(31),
        )
        engine = TransformersEngine(partial(self.family.answering, self.name), tokenizer)
        (done,) = engine.complete([request], sampling)
        if done.finish_reason == TOO_LONG:
            raise RecipeError("the conversation is longer than the model can read: start a new one")
        self.messages.append({"role": "assistant", "content": done.text})
        return done.text


def _typed_questions() -> Iterator[str]:
    """Yield lines of the input until an empty one."""
    mark = ""
    if sys.stdin.isatty():
        mark = "> "
        say("type a question; an empty line or Ctrl-D ends")
    while True:
        print(mark, end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
