"""The recipes and accelerate configs that ship: they pass the check, say what they do, and differ
only where they claim to.
"""

from __future__ import annotations

import itertools
import math
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from recipes_lib.cli import main
from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.launch import load_accelerate_config
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.project import project_root

ROOT = project_root()
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
OWN = ("llama2-7b-dolly", "smollm2-135m-dolly", "quickstart")  # studied here, at one scaling
BORROWED = tuple(
    folder.name
    for folder in sorted((ROOT / "recipes").iterdir())
    if (folder / "_base.yaml").is_file() and folder.name not in OWN
)  # for a model that people have, in a setting whose numbers somebody published
FOLDERS = (*OWN, *BORROWED)
YAMLS = sorted(path for folder in FOLDERS for path in (ROOT / "recipes" / folder).glob("*.yaml"))
RECIPES = [path for path in YAMLS if not path.name.startswith("_")]
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def named(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@cache
def recipe(name: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.yaml")


def flat(value: dict, above: str = "") -> dict[str, object]:
    """Nested values -> dotted key -> value."""
    rows: dict[str, object] = {}
    for key, item in value.items():
        rows |= (
            flat(item, f"{above}{key}.")
            if isinstance(item, dict) and item
            else {f"{above}{key}": item}
        )
    return rows


def differing(left: str, right: str) -> set[str]:
    """Dotted keys in which two recipes differ, apart from name and labels."""
    a, b = flat(recipe(left).to_dict()), flat(recipe(right).to_dict())
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)} - {
        "run.name",
        "run.tags",
        "run.notes",
    }


def training_steps(rows: int, one: Recipe, world_size: int) -> int:
    """Optimizer steps of a training, as transformers counts them: whole batches per process,
    rounded up.
    """
    batches = math.ceil(math.ceil(rows / world_size) / one.train["per_device_train_batch_size"])
    return math.ceil(batches / accumulation_steps(one, world_size)) * one.train["num_train_epochs"]


# Every file


@pytest.mark.parametrize("path", named(YAMLS + CONFIGS))
def test_every_yaml_passes_the_check_through_the_real_entry(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["check", path]) == 0, capsys.readouterr()


def test_the_folders_hold_the_promised_recipes():
    assert {path.stem for path in RECIPES if path.parent.name == "llama2-7b-dolly"} == {
        *("qlora-r8", "qlora-r32", "lora-bf16-r8", "lora-bf16-r32", "full-bf16"),
    }
    assert {path.stem for path in RECIPES if path.parent.name == "smollm2-135m-dolly"} == {
        "lora-r8",
        "lora-r32",
        "qlora-r8",
        "full",
    }
    assert {path.stem for path in RECIPES if path.parent.name == "quickstart"} == {
        "lora-r8",
        "lora-r32",
    }


@pytest.mark.parametrize("path", named(RECIPES))
def test_the_header_launches_this_recipe_with_its_own_default_config(path):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    command = next(line for line in header if "accelerate launch" in line)
    config, target = re.fullmatch(
        r"#   accelerate launch --config_file (\S+) -m recipes_lib\.train (\S+)", command
    ).groups()
    assert target == path
    assert (ROOT / config).is_file()
    assert Path(config).stem == load_recipe(ROOT / path).launch.accelerate
    assert header[0].startswith("# yaml-language-server: $schema=")
    assert len(header) >= 3, "schema, what it is and on which hardware, how to start it"


@pytest.mark.parametrize("path", named(YAMLS))
def test_the_schema_line_leads_to_an_existing_schema(path):
    first = (ROOT / path).read_text(encoding="utf-8").splitlines()[0]
    assert ((ROOT / path).parent / first.split("$schema=")[1]).resolve().is_file()


@pytest.mark.parametrize("path", named(YAMLS + CONFIGS))
def test_lines_fit_a_screen(path):
    assert max(map(len, (ROOT / path).read_text(encoding="utf-8").splitlines())) <= 140


@pytest.mark.parametrize("path", named(RECIPES))
def test_the_default_launch_can_make_the_batch(path):
    one = load_recipe(ROOT / path)
    config = load_accelerate_config(one.launch.accelerate)
    assert accumulation_steps(one, one.launch.gpus or config.num_processes) >= 1


@pytest.mark.parametrize("path", named([p for p in RECIPES if p.parent.name in OWN]))
def test_a_recipe_with_an_adapter_scales_it_by_2_and_adapts_all_linear_layers(path):
    lora = load_recipe(ROOT / path).lora
    if lora is not None:
        assert lora["lora_alpha"] / lora["r"] == 2
        assert set(lora["target_modules"]) == SEVEN


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_has_a_readme_that_names_every_variant_and_has_a_results_table(folder):
    text = (ROOT / "recipes" / folder / "README.md").read_text(encoding="utf-8")
    assert "## Results" in text and "| hardware |" in text
    for path in RECIPES:
        if path.parent.name == folder:
            assert f"`{path.stem}`" in text


@pytest.mark.parametrize("folder", BORROWED)
def test_a_borrowed_recipe_is_short_and_says_licence_rate_and_what_was_published(folder):
    base = (ROOT / "recipes" / folder / "_base.yaml").read_text(encoding="utf-8")
    assert re.search(r"# .*(licence|Apache-2\.0).*gated", base), "licence, and whether it is gated"
    assert re.search(r"#.*\n.*learning_rate|learning_rate.*#", base), "where the rate is from"
    for path in RECIPES:
        if path.parent.name == folder:
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 10, path.name
    readme = (ROOT / "recipes" / folder / "README.md").read_text(encoding="utf-8")
    assert "| number | value | n | source |" in readme and "gated" in readme


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_that_a_readme_names_exists(folder):
    text = (ROOT / "recipes" / folder / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"(?:recipes|accelerate_configs)/[\w./-]+\.yaml", text):
        assert (ROOT / name).is_file(), name


# Controlled variants


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


@pytest.mark.parametrize(
    "name", ["qlora-r8", "qlora-r32", "lora-bf16-r8", "lora-bf16-r32", "full-bf16"]
)
def test_controlled_variants_see_64_examples_per_step_at_one_learning_rate(name):
    one = recipe(f"llama2-7b-dolly/{name}")
    assert one.run.global_batch_size == 64
    assert one.train["learning_rate"] == 1e-4
    split = one.data.split
    assert (split.method, split.validation, split.test) == ("hash", 0.05, 0.05)
    assert one.lora is None or one.lora["lora_dropout"] == 0.05


@pytest.mark.parametrize("folder", ["smollm2-135m-dolly", "quickstart"])
def test_the_small_rank_variants_differ_in_rank_only(folder):
    assert differing(f"{folder}/lora-r8", f"{folder}/lora-r32") == {"lora.r", "lora.lora_alpha"}


def test_the_acceptance_run_is_60_steps_of_16_in_fp32_without_anything_that_depends_on_the_number_of_processes():  # noqa: E501
    one = recipe("smollm2-135m-dolly/lora-r8")
    assert (one.train["max_steps"], one.run.global_batch_size) == (60, 16)
    assert (one.model.dtype, one.train["bf16"]) == ("float32", False)
    assert one.lora["lora_dropout"] == 0
    assert [accumulation_steps(one, world_size) for world_size in (1, 2)] == [8, 4]


def test_the_quickstart_reads_its_own_data_and_says_where_to_start():
    one = recipe("quickstart/lora-r8")
    assert Path(one.data.source).is_file()
    assert "start-here" in one.run.tags


# The original study, numbers from its report

STUDIED = ROOT / "examples" / "original-study"
PUBLISHED = {
    "qlora-r8": {
        "lora": (8, 16),
        "lr": 2e-4,
        "order": "random",
        "optim": "paged_adamw_32bit",
        "split": (0.1, 0.2),
        "batch": 32,
        "logs": (20, 50, 200),
        "launch": ("single_gpu", 1),
        "quantized": True,
        "half": "bf16",
        "rows": 10_507,
        "steps": 987,
    },
    "qlora-r32": {
        "lora": (32, 64),
        "lr": 1e-4,
        "order": "group_by_length",
        "optim": "paged_adamw_32bit",
        "split": (0.1, 0.1),
        "batch": 32,
        "logs": (100, 100, 100),
        "launch": ("single_gpu", 1),
        "quantized": True,
        "half": "bf16",
        "rows": 12_008,
        "steps": 1_128,
    },
    "ddp-qlora-r32": {
        "lora": (32, 64),
        "lr": 1e-4,
        "order": "group_by_length",
        "optim": "paged_adamw_32bit",
        "split": (0.1, 0.1),
        "batch": 64,
        "logs": (100, 100, 100),
        "launch": ("ddp", 2),
        "quantized": True,
        "half": "fp16",
        "rows": 12_008,
        "steps": 564,
    },
    "fsdp-bf16-r32": {
        "lora": (32, 64),
        "lr": 1e-4,
        "order": "group_by_length",
        "optim": "adamw_torch",
        "split": (0.1, 0.1),
        "batch": 64,
        "logs": (100, 100, 100),
        "launch": ("fsdp", 2),
        "quantized": False,
        "half": "bf16",
        "rows": 12_008,
        "steps": 564,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_twin_repeats_the_originals_hyperparameters(name):
    one, original = load_recipe(STUDIED / f"{name}.yaml"), PUBLISHED[name]
    train, split = one.train, one.data.split
    assert (one.lora["r"], one.lora["lora_alpha"], one.lora["lora_dropout"]) == (
        *original["lora"],
        0.05,
    )
    assert set(one.lora["target_modules"]) == SEVEN
    assert (train["learning_rate"], train["train_sampling_strategy"], train["optim"]) == (
        original["lr"],
        original["order"],
        original["optim"],
    )
    assert (split.method, split.validation, split.test, split.seed) == (
        "published",
        *original["split"],
        42,
    )
    assert (one.run.global_batch_size, train["per_device_train_batch_size"]) == (
        original["batch"],
        4,
    )
    assert (train["logging_steps"], train["eval_steps"], train["save_steps"]) == original["logs"]
    assert (train["num_train_epochs"], train["lr_scheduler_type"], train["warmup_steps"]) == (
        3,
        "cosine",
        0.03,
    )
    assert (train["max_length"], train["completion_only_loss"], train["seed"]) == (1024, False, 42)
    assert train["load_best_model_at_end"] is True and train["metric_for_best_model"] == "eval_loss"
    assert (train.get("bf16", False), train.get("fp16", False)) == (
        original["half"] == "bf16",
        original["half"] == "fp16",
    )
    assert (one.data.prompt_format, one.data.source) == ("dolly", "databricks/databricks-dolly-15k")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_twin_quantizes_as_the_original_did(name):
    quantization = load_recipe(STUDIED / f"{name}.yaml").quantization
    if PUBLISHED[name]["quantized"]:
        kind = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
        assert quantization == kind
    else:
        assert quantization is None
        assert load_recipe(STUDIED / f"{name}.yaml").model.dtype == "bfloat16"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_twin_takes_as_many_steps_as_the_original(name):
    one, original = load_recipe(STUDIED / f"{name}.yaml"), PUBLISHED[name]
    accelerate, processes = original["launch"]
    config = load_accelerate_config(accelerate)
    assert one.launch.accelerate == accelerate
    assert (one.launch.gpus or config.num_processes) == processes
    assert accumulation_steps(one, processes) == 8
    rows = 15_011 - math.ceil(15_011 * sum(original["split"]))
    assert rows == original["rows"], "the size that the original's two train_test_split calls leave"
    assert training_steps(rows, one, processes) == original["steps"]


def test_warmup_below_1_is_a_fraction_of_all_steps_in_the_installed_transformers():
    from transformers import TrainingArguments

    assert TrainingArguments.get_warmup_steps(
        type("Arguments", (), {"warmup_steps": 0.03})(), 987
    ) == math.ceil(0.03 * 987)


def test_the_sharded_twin_declares_its_deviation_in_the_header():
    text = (STUDIED / "fsdp-bf16-r32.yaml").read_text(encoding="utf-8")
    assert "Deviation: FSDP2 instead of FSDP1" in text


# Accelerate configs


@pytest.mark.parametrize("path", named(CONFIGS))
def test_an_accelerate_config_is_short_has_a_comment_per_key_and_leaves_the_precision_to_the_recipe(
    path,
):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 15
    assert text.startswith("# ")
    values = yaml.safe_load(text)
    assert values["mixed_precision"] == "no"
    for key in values.get("fsdp_config", {}):
        if key != "fsdp_version":
            assert re.search(rf"{key}: .*#", text), f"{key} has no comment"


def test_the_promised_accelerate_configs_exist():
    names = {
        "single_gpu",
        "ddp",
        "fsdp",
        "fsdp_qlora",
        "ddp_multi_node",
        "fsdp_multi_node",
        "cpu",
        "ddp_cpu",
        "fsdp_cpu",
    }
    assert {path.stem for path in CONFIGS} == names


@pytest.mark.parametrize("path", [path for path in named(CONFIGS) if "fsdp" in path])
def test_a_sharded_config_is_fsdp2_with_whole_state_dicts_and_no_model_of_its_own(path):
    fsdp = load_accelerate_config(str(ROOT / path)).fsdp_config
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert fsdp["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert "fsdp_transformer_layer_cls_to_wrap" not in fsdp, (
        "accelerate asks the model for its layer class"
    )


@pytest.mark.parametrize(
    ("gpu", "cpu"), [("single_gpu", "cpu"), ("ddp", "ddp_cpu"), ("fsdp", "fsdp_cpu")]
)
def test_a_cpu_twin_differs_from_its_config_in_the_device_only(gpu, cpu):
    values = [
        yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in (gpu, cpu)
    ]
    assert values[1] == {**values[0], "use_cpu": True}


@pytest.mark.parametrize("path", named(CONFIGS))
def test_accelerate_itself_reads_the_config(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / path))
    assert (
        config.distributed_type.value == load_accelerate_config(str(ROOT / path)).distributed_type
    )
