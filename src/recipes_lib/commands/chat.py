"""`recipes chat RUN [RUN...]`: type a question, read what the base and each run answer.

Each model keeps its own conversation: it reads its earlier answers, not those of the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from recipes_lib.core.environment import quiet_libraries
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, printable, say, use_color
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.weights.runs import BASE, TRUST, Family, families, finished_run


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="finished runs")
    add("--prompt", help="answer this and stop, instead of asking for questions")
    add("--system", metavar="TEXT", help="system prompt, in place of the recipe's")
    longest = "longest answer (default 200)"
    add("--max-new-tokens", type=int, default=200, metavar="N", help=longest)
    greedy = "0 is greedy and repeatable (default)"
    add("--temperature", type=float, default=0.0, metavar="T", help=greedy)
    add("--trust-remote-code", action="store_true", help=TRUST)
    add("--no-base", action="store_true", help="leave the base's answer out")


def run(args: argparse.Namespace) -> int:
    """Load every run once and answer until the input ends."""
    if args.max_new_tokens < 1 or not 0 <= args.temperature < float("inf"):
        raise RecipeError(
            "recipes chat: --max-new-tokens must be 1 or more, --temperature 0 or more"
        )
    trained = [finished_run(open_run(name), args.trust_remote_code) for name in args.runs]
    distinct = {run.run.path: run for run in trained}
    quiet_libraries()
    loaded = [Family(group) for group in families(list(distinct.values()))]
    models = [
        (family, name)
        for family in loaded
        for name in family.names
        if not (name == BASE and args.no_base)
    ]
    begin: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    conversations = [list(begin) for _ in models]
    for question in questions(args.prompt):
        for (family, name), messages in zip(models, conversations, strict=True):
            messages.append({"role": "user", "content": question})
            text = answer(family, name, messages, args.max_new_tokens, args.temperature)
            messages.append({"role": "assistant", "content": text})
            title = printable(_title(family, name, only_family=len(loaded) == 1))
            heading = f"\x1b[1m{title}\x1b[0m" if use_color() else title
            print(f"{heading}\n{printable(text) or '(empty answer)'}\n", flush=True)
    next_step(f"recipes export {args.runs[0]} --to DIR")
    return ExitCode.DONE


def answer(
    family: Family,
    name: str,
    messages: Sequence[Message],
    max_new_tokens: int,
    temperature: float,
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


def questions(prompt: str | None) -> Iterator[str]:
    """Yield the one question of --prompt, or lines of the input until an empty one."""
    if prompt is not None:
        yield prompt
        return
    asked = sys.stdin.isatty()
    if asked:
        say("type a question; an empty line or Ctrl-D ends")
    while True:
        if asked:
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _title(family: Family, name: str, only_family: bool) -> str:
    """Return what stands over an answer; a base is described where there are several."""
    if only_family or name in family.runs:
        return name
    precision = (family.recipe.base_format or "").replace("-", " ")
    return f"{name} {family.recipe.model.name_or_path}" + (f" in {precision}" if precision else "")
