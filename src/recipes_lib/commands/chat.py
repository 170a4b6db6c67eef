"""`recipes chat RUN [RUN...]`: type a question, read the base's and each run's answer side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from recipes_lib.errors import ExitCode
from recipes_lib.terminal import next_step, printable, say, use_color


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs")
    parser.add_argument("--prompt", help="answer this and stop, instead of asking for questions")
    parser.add_argument("--context", default="", help="text the question is about (prompt formats dolly and alpaca)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="longest answer (default 200)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy and repeatable (default)")
    parser.add_argument("--no-base", action="store_true", help="leave the base's answer out")


def run(args: argparse.Namespace) -> int:
    """Load every run once and answer until the input ends."""
    from recipes_lib.runs.directory import open_run
    from recipes_lib.training.session import quiet_libraries
    from recipes_lib.training.trained import BASE, Family, families, finished_run

    trained = [finished_run(open_run(name)) for name in args.runs]
    quiet_libraries()
    loaded = [Family(group) for group in families(trained)]
    for question in _questions(args.prompt):
        for family in loaded:
            for name in family.names:
                if not (name == BASE and args.no_base):
                    _print_answer(name, answer(family, name, question, args.context, args.max_new_tokens, args.temperature))
    next_step(f"recipes verify {args.runs[0]}")
    return ExitCode.DONE


def answer(family: object, name: str, instruction: str, context: str, max_new_tokens: int, temperature: float) -> str:
    """Return one answer, asked in the prompt format the runs were trained with."""
    import torch

    from recipes_lib.data.prompts import generation_prompt
    from recipes_lib.data.supervision import prompt_ids
    from recipes_lib.training.trained import Family

    assert isinstance(family, Family)
    section, tokenizer = family.recipe.data, family.tokenizer
    ids = prompt_ids(section, tokenizer, generation_prompt(section, tokenizer, instruction=instruction, context=context))
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with family.using(name) as model, torch.no_grad():
        tokens = torch.tensor([ids], device=model.device)
        written = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    return tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True).strip()


def _questions(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    if sys.stdin.isatty():
        say("type a question; an empty line or Ctrl-D ends")
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def _print_answer(name: str, text: str) -> None:
    heading = f"\x1b[1m{name}\x1b[0m" if use_color() else name
    print(f"{heading}\n{printable(text) or '(empty answer)'}\n", flush=True)
