"""Steps, tokens and validations are those that the training makes."""

from pathlib import Path

import pytest
from tests.pairs import write_pair_recipe

from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.files import read_object
from recipes_lib.plan.plan import launch_and_card, plan_of
from recipes_lib.plan.steps import RowLengths, Steps, steps_of


def steps_for(recipe: Path, rows: RowLengths, *words: str) -> Steps:
    loaded = load_recipe(recipe, words)
    return steps_of(loaded, plan_launch(loaded.launch).world_size, rows)


def test_the_tokens_of_a_plan_are_those_of_the_rows_and_not_of_full_steps(tiny_recipe):
    """Of 97 rows in steps of 64 the second step has at most 33; steps x batch would be 32% more."""
    rows = RowLengths((100,) * 97, 97, 0, "made up", counted=True)
    words = ("run.global_batch_size=64", "train.max_steps=-1", "train.num_train_epochs=3")
    steps = steps_for(tiny_recipe, rows, *words)
    assert steps.tokens <= 3 * 97 * 100


@pytest.mark.slow
def test_a_training_has_the_tokens_and_steps_of_its_plan(tiny_recipe, forks, tmp_path):
    words = ("train.max_steps=-1", "train.num_train_epochs=2", "run.name=planned")
    recipe = load_recipe(tiny_recipe, words)
    planned = plan_of(recipe, *launch_and_card(recipe, "cpu")).steps
    runs = tmp_path / "runs"
    code, output = forks.start([tiny_recipe, *words], RECIPES_RUNS_ROOT=str(runs)).wait()
    assert code == 0, output
    summary = read_object(runs / "planned" / "run.json")["summary"]
    assert summary["steps"] == planned.steps
    assert summary["tokens"] == pytest.approx(planned.tokens, rel=0.02)


def test_validations_are_counted_as_the_trainer_makes_them(tiny_recipe):
    rows = RowLengths((10,) * 100, 800, 1, "made up", counted=True)
    for words, number in (
        (["eval_strategy='no'"], 0),
        (["eval_strategy=epoch"], 3),
        (["eval_steps=50"], 6),
        (["eval_steps=null", "logging_steps=20"], 15),
        (["eval_steps=0.1"], 10),
        (["eval_steps=50", "eval_on_start=true"], 7),
    ):
        words = ["eval_strategy=steps", "max_steps=300", *words]
        steps = steps_for(tiny_recipe, rows, *(f"train.{word}" for word in words))
        assert steps.per_epoch == 100 and steps.validation == 10 * number, words


def test_joined_rows_are_a_whole_micro_batch_and_packed_rows_full(tiny_recipe):
    rows = RowLengths((10, 100) * 50, 100, 0, "made up", counted=True)
    joined = steps_for(tiny_recipe, rows, "train.per_device_train_batch_size=4")
    padded = steps_for(tiny_recipe, rows, "train.padding_free=false")
    assert joined.tokens == padded.tokens
    assert joined.largest == joined.row == 400 and padded.row == 100
    rows = RowLengths((48,) * 400, 400, 0, "made up", counted=True)
    words = ("train.packing=true", "train.max_steps=-1", "train.num_train_epochs=1")
    packed = steps_for(tiny_recipe, rows, *words)
    assert packed.steps in (12, 13)  # 100 rows of 192 tokens in steps of 8
    halves = RowLengths((100,) * 400, 400, 0, "made up", counted=True)
    alone = steps_for(tiny_recipe, halves, *words)  # no two of them fit into one row
    assert (alone.steps, alone.tokens) == (50, 40_000)
    longer = RowLengths((300,) * 400, 400, 0, "made up", counted=True)
    for strategy, steps in (("bfd", 50), ("bfd_split", 100), ("wrapped", 78)):
        made = steps_for(tiny_recipe, longer, *words, f"train.packing_strategy={strategy}")
        assert made.steps == steps, strategy
    assert packed.row == 4 * 192


def test_a_pair_is_two_rows_and_the_base_reads_each_once(
    tiny_recipe, tiny_recipe_text, tiny_model_dir
):
    text = tiny_recipe_text(tiny_model_dir)
    path = write_pair_recipe(tiny_recipe.with_name("pairs.yaml"), text)
    recipe = load_recipe(path, ["train.max_length=64"])
    planned = plan_of(recipe, *launch_and_card(recipe, "cpu"))
    rows, steps = planned.rows, planned.steps
    assert rows.train + rows.validation == 90 and rows.counted
    assert max(rows.tokens) == 2 * 64 and not any(length % 2 for length in rows.tokens)
    assert (steps.row, steps.largest) == (64, 4 * 2 * 64)
    mean = sum(rows.tokens) / rows.train
    assert steps.reference == round(90 * mean)
    made_up = RowLengths((4_000,) * 90, 90, 0, "made up")
    assert steps_for(path, made_up, "train.max_length=64").largest == 4 * 2 * 64
