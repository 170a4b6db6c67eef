from __future__ import annotations

from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.config.recipe import PROJECT_DEFAULT, UPSTREAM_DEFAULT, Recipe, load_recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.json_files import DamagedFile
from recipes_lib.core.project import project_root

SHIPPED = sorted(
    path
    for path in (project_root() / "recipes").rglob("*.yaml")
    if not path.name.startswith("_") and "studies" not in path.parts
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_loads_without_a_warning(path):
    recipe = load_recipe(path)
    assert recipe.name == f"{path.parent.name}--{path.stem}"
    assert not recipe.warnings


def test_values_have_their_origin_down_to_the_line(write):
    write(
        "model: {name_or_path: a/b}\ndata:\n  source: rows.jsonl\n  split: {validation: 0.2}\n",
        "base/_b.yaml",
    )
    write("extends: base/_b.yaml\nlora: {r: 8}\ntrain: {activation_checkpointing: true}\n")
    recipe = load_recipe("r.yaml", ["train.seed=3"])
    assert str(recipe.origin_of("data.source")) == "base/_b.yaml:3"
    assert str(recipe.origin_of("data.split.validation")) == "base/_b.yaml:4"
    assert str(recipe.origin_of("train.seed")) == "command line"
    assert str(recipe.origin_of("train.activation_checkpointing")) == "r.yaml:3"
    assert recipe.origin_of("train.logging_nan_inf_filter") == PROJECT_DEFAULT
    assert recipe.origin_of("data.split.seed") == UPSTREAM_DEFAULT
    assert recipe.origin_of("model.dtype") == UPSTREAM_DEFAULT


def test_relative_data_paths_are_meant_from_the_file_that_wrote_them(write):
    write("model: {name_or_path: a/b}\ndata: {source: rows.jsonl}\n", "base/_b.yaml")
    write("extends: base/_b.yaml\ndata: {chat_template: t.jinja}\n")
    Path("base/rows.jsonl").write_text("")
    recipe, here = load_recipe("r.yaml"), Path.cwd()
    assert recipe.data.source == str(here / "base/rows.jsonl")
    assert recipe.data.chat_template == str(here / "t.jinja")
    assert recipe.to_dict()["data"]["source"] == "rows.jsonl"
    assert recipe.to_dict()["data"]["chat_template"] == "t.jinja"
    other = load_recipe("r.yaml", ["data.source=other.jsonl"])
    assert other.data.source == str(here / "other.jsonl")


def test_a_template_of_trl_is_a_name_and_not_a_path_and_a_wrong_one_is_named(write, capsys):
    text = "model: {{name_or_path: a/b}}\ndata: {{source: rows.jsonl, prompt_format: chat, {}}}\n"
    write(text.format("chat_template: trl:gemma3"))
    assert load_recipe("r.yaml").data.chat_template == "trl:gemma3"
    write(text.format("chat_template: trl:gema3"))
    assert main(["check", "r.yaml"]) == 2
    assert "r.yaml:2: data.chat_template: TRL ships no template 'trl:gema3'" in (
        said := capsys.readouterr().err
    )
    assert "did you mean trl:gemma3?" in said


def test_data_beside_the_recipe_comes_before_data_of_the_working_directory(write):
    write(
        "model: {name_or_path: a/b}\ndata: {source: [{source: rows}, {source: more.csv}]}\n",
        "sub/r.yaml",
    )
    Path("rows").mkdir()
    here = Path.cwd()
    missing = str(here / "sub/more.csv")
    assert load_recipe("sub/r.yaml").data.source == [
        {"source": str(here / "rows")},
        {"source": missing},
    ]
    Path("sub/rows").mkdir()
    found = str(here / "sub/rows")
    assert load_recipe("sub/r.yaml").data.source == [{"source": found}, {"source": missing}]
    written = load_recipe("sub/r.yaml").to_dict()["data"]["source"]
    assert written == [{"source": "rows"}, {"source": "more.csv"}]


def test_a_hub_id_and_an_inline_template_are_no_paths(write):
    template = "{{ messages }}"
    write(
        "model: {name_or_path: a/b}\n"
        f"data: {{source: org/rows-v1.5, prompt_format: chat, chat_template: '{template}'}}\n"
    )
    recipe = load_recipe("r.yaml")
    assert (recipe.data.source, recipe.data.chat_template) == ("org/rows-v1.5", template)
    assert recipe.as_written == {}


def test_a_path_through_a_link_names_the_same_file(write):
    Path("far/away").mkdir(parents=True)
    Path("far/rows.jsonl").write_text("{}\n")
    write("model: {name_or_path: a/b}\ndata: {source: ../rows.jsonl}\n", "far/away/r.yaml")
    Path("link").symlink_to("far/away")
    assert Path(load_recipe("link/r.yaml").data.source).samefile("far/rows.jsonl")


def test_a_recipe_that_another_process_reads_is_the_same(write, tmp_path, monkeypatch):
    write("model: {name_or_path: a/b}\ndata: {source: rows.jsonl}\nlora: {}\n", "base/_b.yaml")
    write("extends: base/_b.yaml\ntrain: {warmup_steps: 010}\ndata: {split: {method: none}}\n")
    recipe = load_recipe("r.yaml", ["train.seed=3", "model.kwargs={a: {b: 1}}"])
    assert recipe.warnings
    recipe.write(tmp_path / "recipe.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = Recipe.read(tmp_path / "recipe.json")
    assert again.to_dict() == recipe.to_dict()
    assert again.data == recipe.data
    assert again.written_values() == recipe.written_values()
    assert str(again.origin_of("train.seed")) == "command line"
    assert str(again.error("train.warmup_steps", "bad")) == "r.yaml:2: bad"
    assert str(again.error("data.source", "bad")) == "base/_b.yaml:2: bad"
    assert list(map(str, again.warnings)) == list(map(str, recipe.warnings))
    assert again.text.startswith("extends: base")


def test_names_with_dots_and_digits_in_a_mapping_are_shown_with_their_line(write, tmp_path):
    ranks = {"layers.0.q_proj": 4, "v_proj": 2, "7": 3}
    lines = "".join(f"    {name!r}: {rank}\n" for name, rank in ranks.items())
    write(
        "model: {name_or_path: a/b}\ndata: {source: rows.jsonl}\n"
        f"lora:\n  r: 8\n  rank_pattern:\n{lines}"
    )
    recipe = load_recipe("r.yaml")
    recipe.write(tmp_path / "recipe.json")
    for one in (recipe, Recipe.read(tmp_path / "recipe.json")):
        assert one.written_values()["lora"] == {"r": 8, "rank_pattern": ranks}
        assert str(one.origin_of("lora.rank_pattern.layers.0.q_proj")) == "r.yaml:6"
        assert str(one.error("lora.rank_pattern.7", "bad")) == "r.yaml:8: bad"
        assert str(one.error("lora.rank_pattern.layers.1", "bad")) == "r.yaml:5: bad"


def test_a_damaged_record_of_a_recipe_is_one_line(tmp_path):
    for content in ("{", "[]", "{}", '{"values": 3}'):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(DamagedFile, match=r"damaged|not an object"):
            Recipe.read(tmp_path / "recipe.json")


def test_project_defaults_fill_what_the_recipe_leaves_open(write_with):
    recipe = load_recipe(write_with("train", "activation_checkpointing: true"))
    assert recipe.train["activation_checkpointing"] is True
    assert recipe.train["logging_nan_inf_filter"] is False
    assert recipe.train["ddp_find_unused_parameters"] is False


def test_an_error_is_placed_at_the_key_or_at_its_section(write):
    recipe = load_recipe(write())
    assert str(recipe.error("train.seed", "bad")) == "r.yaml:8: bad"
    assert str(recipe.error("train.optim", "bad")) == "r.yaml:7: bad"
    assert str(recipe.error("launch.accelerate", "bad")) == "r.yaml: bad"


def test_the_run_name_is_folder_and_stem_unless_given(write, write_with):
    write(name="llama-dolly/qlora-r8.yaml")
    assert load_recipe("llama-dolly/qlora-r8.yaml").name == "llama-dolly--qlora-r8"
    assert load_recipe(write_with("run", "name: mine")).name == "mine"
    assert load_recipe("r.yaml", ["run.name=other"]).name == "other"


@pytest.mark.parametrize("name", ["../x", "CON", "a b", "''"])
def test_a_run_name_that_is_no_folder_is_refused_at_its_line(name, write_with):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_with("run", f"name: {name}"))
    assert str(caught.value).startswith("r.yaml:10: run.name")


def test_the_resolved_form_is_plain_and_complete(write):
    values = load_recipe(write(), ["run.name=x"]).to_dict()
    assert list(values) == ["model", "quantization", "lora", "data", "train", "run", "launch"]
    assert values["quantization"] is None
    assert values["lora"] == {"r": 8}
    assert values["data"]["split"] == {"method": "hash", "validation": 0.1, "test": 0.0, "seed": 42}
    assert values["run"]["name"] == "x"


def test_written_values_leave_defaults_out(write):
    values = load_recipe(write()).written_values()
    assert values["model"] == {"name_or_path": "meta-llama/Llama-2-7b-hf"}
    assert values["data"] == {"source": "rows.jsonl"}
    assert "launch" not in values
