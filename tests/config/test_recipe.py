"""A resolved recipe: places of values, absolute paths, and that it is a recipe again anywhere."""

import os
from pathlib import Path

from recipes_lib.config.recipe import load_recipe


def test_values_have_their_origin_down_to_the_line(write):
    write(
        "model: {name_or_path: a/b}\ndata:\n  source: rows.jsonl\n  split: {validation: 0.2}\n",
        "base/_b.yaml",
    )
    write("extends: base/_b.yaml\nlora: {r: 8}\ntrain: {activation_checkpointing: true}\n")
    recipe = load_recipe("r.yaml", ["train.seed=3"])
    for key, place in {
        "data.source": "base/_b.yaml:3",
        "data.split.validation": "base/_b.yaml:4",
        "train.seed": "command line",
        "train.logging_nan_inf_filter": "project default",
        "model.dtype": "default",
    }.items():
        assert str(recipe.origin_of(key)) == place
    for key, place in {"lora.r": ":2", "lora.bias": ":2", "launch.accelerate": ""}.items():
        assert str(recipe.error(key, "bad")) == f"r.yaml{place}: bad"


def test_paths_are_meant_from_the_file_that_wrote_them(write):
    write("model: {name_or_path: a/b}\ndata: {source: rows.jsonl}\n", "base/_b.yaml")
    write("extends: base/_b.yaml\ndata: {chat_template: t.jinja}\n")
    Path("base/rows.jsonl").write_text("")
    here = Path.cwd()
    data = load_recipe("r.yaml").data
    assert data.source == str(here / "base/rows.jsonl")
    assert data.chat_template == str(here / "t.jinja")
    data = load_recipe("r.yaml", ["data.source=other.jsonl"]).data
    assert data.source == str(here / "other.jsonl")
    mixture = load_recipe("r.yaml", ["data.source=[{source: rows.jsonl, weight: 2}, org/rows]"])
    part, hub = mixture.data.source
    assert (part.source, part.weight, hub) == (str(here / "rows.jsonl"), 2, "org/rows")
    write("", "base/models/own/config.json")
    write("model: {name_or_path: models/own}\nextends: _b.yaml\n", "base/own.yaml")
    assert load_recipe("base/own.yaml").model.name_or_path == str(here / "base/models/own")
    for template in ("{{ messages }}", "trl:gemma3"):  # these and a Hub id are no paths
        recipe = load_recipe("r.yaml", [f"data.chat_template='{template}'"])
        assert recipe.data.chat_template == template


def test_a_resolved_and_a_shown_recipe_are_the_same_anywhere(write, tmp_path, said):
    write("model: {name_or_path: a/b}\ndata: {source: rows.jsonl}\nlora: {}\n", "base/_b.yaml")
    Path("base/rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n' * 20)
    write("extends: base/_b.yaml\ntrain: {eval_strategy: no, learning_rate: 1e-5}\n")
    words = ["train.seed=3", "lora.rank_pattern={'layers.0.q_proj': 4}"]
    recipe = load_recipe("r.yaml", words)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    recipe.write(elsewhere / "resolved.yaml")
    (elsewhere / "shown.yaml").write_text(said("show", "r.yaml", *words))
    os.chdir(elsewhere)
    for name in ("resolved.yaml", "shown.yaml"):
        again = load_recipe(name)
        assert (again.to_dict(), again.name) == (recipe.to_dict(), recipe.name)
        said("check", name)


def test_a_shipped_recipe_can_be_extended_by_name_from_anywhere(write):
    write("extends: quickstart/lora-r8\ntrain: {seed: 9}\n", "mine.yaml")
    recipe, origin = load_recipe("mine.yaml"), load_recipe("quickstart/lora-r8")
    assert recipe.train == {**origin.train, "seed": 9}
    assert recipe.data == origin.data


def test_the_run_name_is_folder_and_stem_unless_given(write):
    write(name="llama-dolly/qlora-r8.yaml")
    assert load_recipe("llama-dolly/qlora-r8.yaml").name == "llama-dolly--qlora-r8"
    assert load_recipe("llama-dolly/qlora-r8.yaml", ["run.name=other"]).name == "other"
