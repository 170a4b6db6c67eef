"""The numbers of docs/out-of-memory.md are the planner's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes_lib.config.recipe import load_recipe
from recipes_lib.planning.activations import activations_of, reference_per_token
from recipes_lib.planning.plan import Plan, plan_recipe

PAGE = (Path(__file__).resolve().parents[2] / "docs/out-of-memory.md").read_text(encoding="utf-8")
RECIPE = "llama2-7b-dolly/lora-bf16-r32"
ROWS = re.findall(
    r"^\| (\(none\)|recipe `[^`]+`|`[^`]+`) \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.MULTILINE
)
ACTIVATIONS = [row for row in ROWS if "lora_dropout` " in row[0] or "checkpointing: true" in row[0]]
CHANGES = [row for row in ROWS if row not in ACTIVATIONS]


def plan_of(change: str) -> Plan:
    words = change.strip("`").removeprefix("recipe `").split()
    if change.startswith("recipe"):
        return plan_recipe(load_recipe(words[0]), gpu="h100-80gb")
    if words[0] == "--accelerate":
        return plan_recipe(
            load_recipe(RECIPE), gpu="h100-80gb", accelerate=words[1], gpus=int(words[3])
        )
    return plan_recipe(load_recipe(RECIPE, [] if change == "(none)" else words), gpu="h100-80gb")


def test_the_page_has_its_tables() -> None:
    assert len(CHANGES) == 17


@pytest.mark.parametrize(("change", "gib", "minutes"), CHANGES, ids=lambda value: value)
def test_a_row_of_the_page_is_what_the_planner_says(change: str, gib: str, minutes: str) -> None:
    plan = plan_of(change)
    assert float(gib) == pytest.approx(plan.memory.needed, abs=0.06)
    assert float(minutes) == pytest.approx(
        (plan.duration.training + plan.duration.validation) / 60, abs=0.06
    )


@pytest.mark.parametrize(
    ("words", "checkpointed"), [([], False), (["lora.lora_dropout=0"], False), ([], True)]
)
def test_the_activations_of_the_page_are_the_planners(words: list[str], checkpointed: bool) -> None:
    settings = plan_recipe(load_recipe(RECIPE, words), gpu="h100-80gb").settings
    kept = activations_of(settings)
    numbers = (
        (kept.checkpointed, kept.checkpointed)
        if checkpointed
        else (reference_per_token(settings), kept.per_token)
    )
    row = (
        "`train.activation_checkpointing: true`"
        if checkpointed
        else f"`lora_dropout` {'0' if words else '0.05'}"
    )
    assert f"| {row} | {numbers[0] / 2**20:.2f} | {numbers[1] / 2**20:.2f} |" in PAGE
