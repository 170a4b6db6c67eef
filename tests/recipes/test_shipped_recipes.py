"""The recipes and accelerate configs that ship: they pass the check, say what they do, and differ
only where they claim to. Their values are held by tests/frozen.
"""

import itertools
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import yaml

from recipes_lib.cli import main
from recipes_lib.config.launch import load_accelerate_config
from recipes_lib.config.recipe import Recipe, accumulation_steps, load_recipe
from recipes_lib.core.files import read_rows
from recipes_lib.core.project import project_root
from recipes_lib.training.resume_guard import flatten

ROOT = project_root()
STUDIED = ROOT / "examples" / "original-study"
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
OWN = ("llama2-7b-dolly", "smollm2-135m-dolly", "quickstart")  # studied here, at one scaling
FOLDERS = [path.parent for path in sorted((ROOT / "recipes").glob("*/_base.yaml"))]
YAMLS = [path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))]
RECIPES = [path for path in YAMLS if not path.name.startswith("_")]
VARIANTS = {
    "llama2-7b-dolly": {"qlora-r8", "qlora-r32", "lora-bf16-r8", "lora-bf16-r32", "full-bf16"},
    "smollm2-135m-dolly": {"lora-r8", "lora-r32", "qlora-r8", "full"},
    "quickstart": {"lora-r8", "lora-r32", "lora-r8-dpo"},
}
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@cache
def recipe(name: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.yaml")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def differing(left: str, right: str) -> set[str]:
    """Dotted keys in which two recipes differ, apart from name and labels."""
    a, b = flatten(recipe(left).to_dict()), flatten(recipe(right).to_dict())
    keys = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
    return keys - {"run.name", "run.tags", "run.notes"}


def test_every_yaml_passes_the_check_through_the_real_entry(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    for path in YAMLS + CONFIGS:
        if main(["check", str(path.relative_to(ROOT))]):
            wrong.append(capsys.readouterr().err)
    assert not wrong


def test_the_folders_hold_the_promised_recipes():
    for folder, names in VARIANTS.items():
        assert {path.stem for path in RECIPES if path.parent.name == folder} == names
    assert {path.stem for path in CONFIGS} == {
        *("single_gpu", "ddp", "fsdp", "fsdp_qlora", "ddp_multi_node", "fsdp_multi_node"),
        *("cpu", "ddp_cpu", "fsdp_cpu"),
    }


def complaints_about(path: Path) -> Iterator[str]:
    """Yield what is wrong with the comments of a recipe."""
    lines = text_of(path).splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    schema = header[0].partition("$schema=")[2]
    if not (path.parent / schema).resolve().is_file():
        yield "the schema line leads nowhere"
    if max(map(len, lines)) > 140:
        yield "a line does not fit a screen"
    if path.name.startswith("_"):
        return
    launch = r"#   accelerate launch --config_file (\S+) -m recipes_lib\.train (\S+)"
    command = re.search(launch, text_of(path))
    if not command or command[2] != str(path.relative_to(ROOT)) or len(header) < 3:
        yield "the header says neither hardware nor how to start this recipe"
    elif Path(command[1]).stem != load_recipe(path).launch.accelerate:
        yield "the header starts it with another config than its own"


def test_headers_say_hardware_schema_and_the_command_of_this_recipe():
    wrong = [(str(path), what) for path in YAMLS for what in complaints_about(path)]
    assert not wrong


def test_own_adapters_are_scaled_by_2_on_all_linear_layers():
    for path in RECIPES:
        lora = load_recipe(path).lora
        if path.parent.name in OWN and lora is not None:
            assert lora["lora_alpha"] / lora["r"] == 2, path
            assert set(lora["target_modules"]) == SEVEN, path


def test_each_folder_has_a_readme_with_every_variant_results_and_files_that_exist():
    for folder in FOLDERS:
        text = text_of(folder / "README.md")
        assert "## Results" in text and "| hardware |" in text, folder
        for path in RECIPES:
            assert path.parent != folder or f"`{path.stem}`" in text, path
        for name in re.findall(r"(?:recipes|accelerate_configs)/[\w./-]+\.yaml", text):
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    ("left", "right", "keys"),
    [
        ("qlora-r8", "qlora-r32", {"lora.r", "lora.lora_alpha"}),
        ("lora-bf16-r8", "lora-bf16-r32", {"lora.r", "lora.lora_alpha"}),
        ("qlora-r8", "lora-bf16-r8", {"quantization"}),
        ("qlora-r32", "lora-bf16-r32", {"quantization"}),
        (
            "lora-bf16-r8",
            "full-bf16",
            {"lora", "train.activation_checkpointing", "launch.accelerate", "launch.gpus"},
        ),
    ],
)
def test_controlled_variants_differ_in_the_declared_keys_only(left, right, keys):
    found = differing(f"llama2-7b-dolly/{left}", f"llama2-7b-dolly/{right}")
    found = {key.partition(".")[0] if key.partition(".")[0] in keys else key for key in found}
    assert found == keys


def test_controlled_variants_see_64_examples_per_step_at_one_learning_rate():
    for name in VARIANTS["llama2-7b-dolly"]:
        loaded = recipe(f"llama2-7b-dolly/{name}")
        split = loaded.data.split
        assert (loaded.run.global_batch_size, loaded.train["learning_rate"]) == (64, 1e-4)
        assert (split.method, split.validation, split.test) == ("hash", 0.05, 0.05)
        assert loaded.lora is None or loaded.lora["lora_dropout"] == 0.05
    for folder in ("smollm2-135m-dolly", "quickstart"):
        ranks = {"lora.r", "lora.lora_alpha"}
        assert differing(f"{folder}/lora-r8", f"{folder}/lora-r32") == ranks


@pytest.mark.parametrize(
    ("name", "processes", "held_out", "steps"),
    [
        ("qlora-r8", 1, 0.3, 987),
        ("qlora-r32", 1, 0.2, 1_128),
        ("ddp-qlora-r32", 2, 0.2, 564),
        ("fsdp-bf16-r32", 2, 0.2, 564),
    ],
)
def test_an_original_recipe_takes_the_steps_of_its_report(name, processes, held_out, steps):
    loaded = load_recipe(STUDIED / f"{name}.yaml")
    config = load_accelerate_config(loaded.launch.accelerate)
    split, train = loaded.data.split, loaded.train
    assert (loaded.launch.gpus or config.num_processes) == processes
    assert split.validation + split.test == pytest.approx(held_out)
    rows = 15_011 - math.ceil(15_011 * held_out)
    batches = math.ceil(math.ceil(rows / processes) / train["per_device_train_batch_size"])
    per_epoch = math.ceil(batches / accumulation_steps(loaded, processes))
    assert per_epoch * train["num_train_epochs"] == steps
    if name.startswith("fsdp"):
        assert "Deviation: FSDP2 instead of FSDP1" in text_of(STUDIED / f"{name}.yaml")


def test_an_accelerate_config_is_short_commented_and_leaves_the_precision_to_the_recipe():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in CONFIGS:
        text, config = text_of(path), load_accelerate_config(path.stem)
        assert len(text.splitlines()) <= 15 and text.startswith("# "), path
        assert config.mixed_precision == "no", path
        read_by_accelerate = load_config_from_file(str(path))
        assert read_by_accelerate.distributed_type.value == config.distributed_type
        for key in config.fsdp_config.keys() - {"fsdp_version"}:
            assert re.search(rf"{key}: .*#", text), f"{key} has no comment in {path}"
        if config.fsdp_config:
            assert config.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
            # accelerate asks the model for its layer class
            assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config


def test_a_config_for_cpus_differs_from_its_config_in_the_device_only():
    for gpu, cpu in (("single_gpu", "cpu"), ("ddp", "ddp_cpu"), ("fsdp", "fsdp_cpu")):
        values, on_cpu = (
            yaml.safe_load(text_of(ROOT / "accelerate_configs" / f"{name}.yaml"))
            for name in (gpu, cpu)
        )
        assert on_cpu == {**values, "use_cpu": True}


def test_shipped_pairs_differ_in_style_and_not_in_length_and_held_out_ones_are_not_trained_on():
    trained = ROOT / "recipes/quickstart/data/preferences.jsonl"
    held_out = ROOT / "evals/quickstart/preference/pairs.jsonl"
    prompts = set()
    for file, number in ((trained, 45), (held_out, 15)):
        rows = list(read_rows(file))
        assert len(rows) == number
        for row in rows:
            assert re.search("^In short: .+\nGood to know: .+$", row["chosen"])
            assert "\n" not in row["rejected"]
            prompts.add(row["prompt"])
        lengths = [median(len(row[name]) for row in rows) for name in ("chosen", "rejected")]
        assert max(lengths) < 1.1 * min(lengths)
    assert len(prompts) == 60
