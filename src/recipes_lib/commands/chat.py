"""`recipes chat RUN [RUN...]`: type a question, read the base's and each run's answer
side by side.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.core.libraries import quiet_libraries
from recipes_lib.core.run_directory import open_run
from recipes_lib.core.terminal import next_step, printable, say, use_color
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.weights.finished_run import BASE, TRUST, Family, families, finished_run

NARROWEST = 36  # columns of text; below that answers stand one under the other
GAP = "  |  "


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="finished runs")
    add("--prompt", help="answer this and stop, instead of asking for questions")
    context = "text the question is about (prompt formats dolly and alpaca)"
    add("--context", default="", help=context)
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

    trained = {
        one.run.path: one
        for one in (finished_run(open_run(name), args.trust_remote_code) for name in args.runs)
    }
    quiet_libraries()
    loaded = [Family(group) for group in families(list(trained.values()))]
    for question in _questions(args.prompt):
        answers: list[tuple[str, str]] = []
        for family in loaded:
            for name in family.names:
                if name == BASE and args.no_base:
                    continue
                words = (question, args.context, args.max_new_tokens, args.temperature)
                text = answer(family, name, *words)
                answers.append((_title(family, name, alone=len(loaded) == 1), text))
        _print_answers(answers)
    next_step(f"recipes verify {args.runs[0]}")
    return ExitCode.DONE


def answer(
    family: Family,
    name: str,
    instruction: str,
    context: str,
    max_new_tokens: int,
    temperature: float,
) -> str:
    """Return one answer, asked in the prompt format the run was trained with (the base: as the
    first run).
    """
    import torch

    from recipes_lib.data.supervision import prompt_ids

    section, tokenizer = family.prompting(name)
    prompt = generation_prompt(section, tokenizer, instruction=instruction, context=context)
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


def side_by_side(answers: Sequence[tuple[str, str]], width: int) -> list[str] | None:
    """Return the lines of a table with one column per answer, or None where the columns would be
    too narrow.

    Args:
        answers: name and text of each; control characters are shown, not obeyed.
        width: of the terminal, in character cells.
    """
    cells = (width - len(GAP) * (len(answers) - 1)) // len(answers)
    if len(answers) < 2 or cells < NARROWEST:
        return None
    columns = [
        [*_wrapped(name, cells), "-" * cells, *_wrapped(_shown(text), cells)]
        for name, text in answers
    ]
    return [
        GAP.join(_padded(cell, cells) for cell in row).rstrip()
        for row in zip_longest(*columns, fillvalue="")
    ]


def _title(family: Family, name: str, alone: bool) -> str:
    """Return what stands over an answer; a base is described where there are several."""
    if alone or name in {one.run.name for one in family.runs}:
        return name
    form = (family.recipe.base_format or "").replace("-", " ")
    return f"{name} {family.recipe.model.name_or_path}" + (f" in {form}" if form else "")


def _questions(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    asked = sys.stdin.isatty()
    if asked:
        say("type a question; an empty line or Ctrl-D ends")
    while True:
        if asked:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def _print_answers(answers: Sequence[tuple[str, str]]) -> None:
    """Print in columns on a terminal that is wide enough, else one under the other."""
    table = (
        side_by_side(answers, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    )
    if table is not None:
        print("\n".join(table) + "\n", flush=True)
        return
    for name, text in answers:
        heading = f"\x1b[1m{printable(name)}\x1b[0m" if use_color() else printable(name)
        print(f"{heading}\n{_shown(text)}\n", flush=True)


def _shown(text: str) -> str:
    return printable(text) or "(empty answer)"


def _width(text: str) -> int:
    """Return how many cells a terminal takes for `text`: East Asian characters take two, combining
    marks none.
    """
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def _padded(text: str, cells: int) -> str:
    return text + " " * (cells - _width(text))


def _wrapped(text: str, cells: int) -> list[str]:
    """Return `text` in lines of at most `cells`, broken between words, and inside a word only when
    it is longer than a line.
    """
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if line and _width(line) + 1 + _width(word) > cells:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
            while _width(line) > cells:
                cut = _fitting(line, cells)
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines


def _fitting(text: str, cells: int) -> int:
    """Return how many characters of `text` fit into `cells`."""
    taken = 0
    for position, char in enumerate(text):
        taken += _width(char)
        if taken > cells:
            return position
    return len(text)
