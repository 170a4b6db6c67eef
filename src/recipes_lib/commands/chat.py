"""`recipes chat RUN [RUN...]`: type a question, read what the base and each run answer.

Each model keeps its own conversation: it reads its earlier answers, not those of the others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, say
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import generation_prompt
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
    trained = [finished_run(open_run(name), trust_remote_code) for name in dict.fromkeys(runs)]
    distinct = {run.run.path: run for run in trained}
    quiet_libraries()
    loaded = [Family(group) for group in families(list(distinct.values()))]
    asked = [
        (family, name, _title(family, name, len(loaded)))
        for family in loaded
        for name in family.names
        if not (no_base and name == BASE)
    ]
    begin: list[Message] = [{"role": "system", "content": system}] if system else []
    conversations = [list(begin) for _ in asked]
    for question in [prompt] if prompt is not None else _questions():
        for (family, name, title), messages in zip(asked, conversations, strict=True):
            messages.append({"role": "user", "content": question})
            text = answer(family, name, messages, max_new_tokens, temperature)
            messages.append({"role": "assistant", "content": text})
            say(f"{title}\n{text or '(empty answer)'}\n")
    return next_step("recipes", "export", runs[0], "--to", f"{trained[0].run.name}-export")


def _title(family: Family, name: str, num_bases: int) -> str:
    model = family.recipe.model.name_or_path if name == BASE and num_bases > 1 else ""
    form = f"in {family.recipe.base_format}" if model and family.recipe.base_format else ""
    return " ".join(filter(None, [name, model, form]))


def answer(
    family: Family, name: str, messages: Sequence[Message], max_new_tokens: int, temperature: float
) -> str:
    """Return the next answer of a conversation, asked in the prompt format the run was trained with
    (the base: as the first run).
    """
    import torch

    from recipes_lib.data.supervision import prompt_ids

    section, tokenizer = family.prompting(name)
    prompt = generation_prompt(section, tokenizer, messages=messages)
    ids = prompt_ids(section, tokenizer, prompt)
    sampling = {"temperature": temperature} if temperature > 0 else {}
    with family.answering(name) as model, torch.no_grad():
        tokens = torch.tensor([ids], device=model.device)
        written = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=temperature > 0,
            **sampling,
        )
    return tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True).strip()


def _questions() -> Iterator[str]:
    """Yield lines of the input until an empty one."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        say("type a question; an empty line or Ctrl-D ends")
    while True:
        if at_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
