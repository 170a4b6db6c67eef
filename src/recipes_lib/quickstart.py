"""`make quickstart`: two small adapters trained on this machine, and what they learnt shown beside the base model.

    python -m recipes_lib.quickstart

Every step is a verb that works by itself; this script only calls them in order and says so.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from recipes_lib.cli import main as recipes
from recipes_lib.recipe.project import project_root
from recipes_lib.terminal import next_step, say

if TYPE_CHECKING:
    from recipes_lib.training.trained import Family

ARMS = ("lora-r8", "lora-r32")
# The house style that the instruction set teaches; described in recipes/quickstart/data/README.md.
STYLE = re.compile(r"^In short: .+\nGood to know: .+$")
ANSWER_TOKENS = 80


def main() -> int:
    """Train, check the style on held-out prompts, and name the next command; return the exit code of the first failure."""
    started = time.monotonic()
    folder = project_root() / "recipes" / "quickstart"
    for number, arm in enumerate(ARMS, 1):
        say(f"\n[{number}/3] recipes train recipes/quickstart/{arm}.yaml")
        code = recipes(["train", str(folder / f"{arm}.yaml")])
        if code:
            return code
    say("\n[3/3] did they learn the house style? 20 held-out prompts, greedy answers")
    show_style(folder / "data" / "heldout_prompts.jsonl")
    say(f"\nquickstart took {time.monotonic() - started:.0f} s")
    next_step(f"recipes chat {run_name(ARMS[0])}")
    return 0


def run_name(arm: str) -> str:
    """Return the run of an arm."""
    return f"quickstart--{arm}"


def show_style(prompts_file: Path) -> dict[str, float]:
    """Print one answer of each model, the validation losses, and how many held-out answers have the style.

    Returns:
        Share of answers in the house style, by model name.
    """
    from recipes_lib.runs.directory import open_run
    from recipes_lib.training.metrics import read_metrics
    from recipes_lib.training.session import quiet_libraries
    from recipes_lib.training.trained import Family, finished_run

    quiet_libraries()
    prompts = [json.loads(line) for line in prompts_file.read_text(encoding="utf-8").splitlines()]
    runs = [finished_run(open_run(run_name(arm))) for arm in ARMS]
    family = Family(runs)
    shares, examples = {}, []
    for name in family.names:
        answers = _answers(family, name, prompts)
        in_style = sum(bool(STYLE.match(text)) for text in answers)
        shares[name] = in_style / len(prompts)
        examples.append((name, answers[0]))
        say(f"  {name}: {in_style} of {len(prompts)} answers in the house style")
    say(f"\n  {prompts[0]['instruction']}")
    for name, text in examples:
        say(f"  {name}: {text}")
    say("")
    for one in runs:
        losses = [line["eval_loss"] for line in read_metrics(one.run.metrics) if "eval_loss" in line]
        say(f"  {one.run.name}: validation loss {' -> '.join(f'{loss:.3f}' for loss in losses)}; {one.run.path}")
    return shares


def _answers(family: Family, name: str, prompts: list[dict[str, str]]) -> list[str]:
    from recipes_lib.commands.chat import answer

    return [answer(family, name, row["instruction"], row["context"], ANSWER_TOKENS, 0.0) for row in prompts]


if __name__ == "__main__":
    sys.exit(main())
