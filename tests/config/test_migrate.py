"""recipes migrate: flat TRL files of each style become recipes that pass the check, and nothing is
lost without a word.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import yaml

from recipes_lib.cli import main
from recipes_lib.commands import migrate as command
from recipes_lib.config.loader import load_document
from recipes_lib.config.migrate import (
    LORA_DEFAULTS,
    MOVES,
    OTHER_LOSSES,
    OTHER_TRAINERS,
    mixture_sources,
)
from recipes_lib.config.validation import check
from recipes_lib.config.vocabulary import subschema
from recipes_lib.core.errors import RecipeError

FLAT = Path(__file__).parent / "flat_configs"
STYLES = sorted(path.stem for path in FLAT.glob("*.yaml"))


def run_migrate(source: Path, output: Path, *flags: str) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(source), "--output", str(output), *flags]))


@pytest.fixture
def migrated(tmp_path, capsys):
    """Migrate a file of flat_configs, or a text: (values, text of the recipe, what was printed)."""

    def work(style: str):
        source = FLAT / f"{style}.yaml"
        if not source.exists():
            source = tmp_path / "flat.yaml"
            source.write_text(style, encoding="utf-8")
        output = tmp_path / "out" / "recipe.yaml"
        assert run_migrate(source, output, "--force") == 0
        text = output.read_text(encoding="utf-8")
        return yaml.safe_load(text), text, capsys.readouterr().out

    return work


@pytest.mark.parametrize("style", STYLES)
def test_every_style_passes_the_check_without_warnings(style, migrated, tmp_path):
    migrated(style)
    document = load_document(tmp_path / "out" / "recipe.yaml")
    assert document.kind.name == "recipe"
    assert check(document, full=False) == []
    assert document.warnings == []


@pytest.mark.parametrize("style", STYLES)
def test_every_key_and_every_comment_of_the_flat_file_is_accounted_for(style, migrated):
    _, text, printed = migrated(style)
    flat = (FLAT / f"{style}.yaml").read_text(encoding="utf-8")
    for key in yaml.safe_load(flat):
        assert f": {key} " in printed, f"{key} is not in the list of changes"
    for comment in [
        line.split("# ", 1)[1]
        for line in flat.splitlines()
        if line.lstrip().startswith("#") or "   # " in line
    ]:
        assert comment in text


def test_handbook_style_lands_in_the_sections(migrated):
    values, text, printed = migrated("handbook")
    assert values["model"] == {
        "name_or_path": "example-org/small-base-7b",
        "revision": "main",
        "dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
    }
    assert values["lora"] == {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.05,
    }
    assert values["quantization"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    assert values["train"]["activation_checkpointing_kwargs"] == {"use_reentrant": False}
    assert values["train"]["max_length"] == 2048
    assert values["train"]["warmup_steps"] == 0.1
    assert values["run"] == {"name": "small-7b-sft-qlora"}
    assert "learning_rate: 2.0e-04   # tuned on 1% of the rows" in text, (
        "the number is copied as it was written"
    )
    assert "next: recipes check" in printed


def test_inline_chat_template_is_carried_over_unchanged(migrated):
    flat = yaml.safe_load((FLAT / "handbook.yaml").read_text(encoding="utf-8"))
    assert migrated("handbook")[0]["data"]["chat_template"] == flat["chat_template"]


def test_block_text_keeps_its_blank_lines_and_its_hash_signs(migrated):
    values, _, _ = migrated("open_r1")
    assert (
        values["data"]["system_prompt"]
        == "Think first.\n\nThen answer.   # this is part of the prompt\n"
    )


def test_mixture_becomes_a_list_of_sources_with_their_weights(migrated):
    values, text, printed = migrated("handbook")
    assert values["data"]["source"] == [
        {"source": "example-org/conversations", "subset": "default", "source_split": "train_sft"},
        {"source": "example-org/mathematics", "source_split": "train", "weight": 0.5},
    ]
    assert "NOT CARRIED OVER (test_split_size 1000 rows" in printed
    assert "#         - id: example-org/mathematics" in text


def test_mixer_with_one_data_set_becomes_one_source(migrated):
    values, _, printed = migrated("handbook_old")
    assert values["data"]["source"] == "example-org/dialogues"
    assert values["data"]["source_split"] == "train_sft"
    assert "dataset_splits NOT CARRIED OVER" in printed


def test_list_of_data_sets_in_trls_own_form():
    form = [
        {"path": "json", "data_files": "rows.jsonl"},
        {"path": "org/set", "name": "en", "split": "train", "fraction": 0.2},
    ]
    sources, lost = mixture_sources(form)
    assert sources == [
        {"source": "rows.jsonl"},
        {"source": "org/set", "subset": "en", "source_split": "train"},
    ]
    assert len(lost) == 1 and "0.2" in lost[0]


def test_fractional_test_split_becomes_the_validation_fraction(migrated):
    flat = (
        "model_name_or_path: m\nlearning_rate: 1e-5\ndataset_mixture: {datasets: [{id: a/b}],"
        " test_split_size: 0.05}\n"
    )
    assert migrated(flat)[0]["data"]["split"] == {"method": "hash", "validation": 0.05}


def test_unquoted_no_becomes_text_not_false(migrated):
    values, _, _ = migrated("handbook_old")
    assert values["train"]["eval_strategy"] == "no"
    assert values["train"]["save_strategy"] == "no"
    assert values["data"]["split"] == {"method": "none"}, "no evaluation: no row is held out"


def test_old_names_get_todays_names_and_values(migrated):
    values, _, _ = migrated("handbook_old")
    assert values["model"]["dtype"] == "bfloat16"
    assert values["model"]["attn_implementation"] == "flash_attention_2"
    assert values["train"]["train_sampling_strategy"] == "group_by_length"
    assert values["train"]["warmup_steps"] == 0.1, "warmup_steps: 0 gives way to the ratio"
    assert values["lora"] is None


def test_a_secret_is_copied_nowhere(migrated):
    _, text, printed = migrated("open_r1")
    assert "hf_abc" not in text + printed
    assert "hub_token NOT CARRIED OVER" in printed


def test_keys_of_no_class_stay_as_comments_and_are_named(migrated):
    values, text, printed = migrated("open_r1")
    assert "benchmarks NOT CARRIED OVER" in printed
    assert "#       - aime24" in text
    assert "benchmarks" not in values["train"]


def test_a_value_that_the_check_refuses_stays_as_a_comment_with_the_reason(migrated):
    values, text, printed = migrated("trl_cli")
    assert "max_grad_norm" not in values["train"]
    assert "max_grad_norm NOT CARRIED OVER" in printed
    assert "#     max_grad_norm: none" in text


def test_adapter_defaults_are_trls_not_pefts(migrated):
    values, _, printed = migrated("trl_cli")
    assert values["lora"] == {"target_modules": "all-linear", **LORA_DEFAULTS}
    assert "added lora.lora_alpha: 32" in printed


def test_the_adapter_defaults_are_those_of_the_installed_trl():
    from trl import ModelConfig

    assert {
        key: getattr(ModelConfig(), key if key.startswith("lora_") else f"lora_{key}")
        for key in LORA_DEFAULTS
    } == LORA_DEFAULTS


def test_every_key_of_trls_model_and_data_arguments_has_a_rule():
    import dataclasses

    from trl import ModelConfig, ScriptArguments

    from recipes_lib.config.migrate import _SPECIAL, NOT_CARRIED, WITHOUT_EFFECT

    ruled = {*MOVES, *_SPECIAL, *NOT_CARRIED, *WITHOUT_EFFECT}
    fields = {
        field.name for cls in (ModelConfig, ScriptArguments) for field in dataclasses.fields(cls)
    }
    assert fields - ruled == set()


def test_adapter_keys_without_use_peft_do_not_become_an_adapter(migrated):
    values, _, printed = migrated(
        "model_name_or_path: m\ndataset_name: a/b\nlearning_rate: 1e-5\nlora_r: 8\n"
    )
    assert values["lora"] is None
    assert "lora_r NOT CARRIED OVER" in printed


def test_loss_on_answers_only_is_kept_as_such(migrated):
    values, _, _ = migrated(
        "model_name_or_path: m\ndataset_name: a/b\nlearning_rate: 1e-5\nassistant_only_loss: true\n"
    )
    assert values["data"]["chat_loss"] == "all"
    assert "completion_only_loss" not in values["train"]


def test_aliases_and_flow_style_are_read(migrated):
    values, _, _ = migrated("{model_name_or_path: m, dataset_name: a/b, learning_rate: 1.0e-5}")
    assert values["train"]["learning_rate"] == 1e-5
    text = (
        "model_name_or_path: &name org/m\nhub_model_id: *name\ndataset_name: a/b\nlearning_rate:"
        " 1e-5\n"
    )
    assert migrated(text)[0]["train"]["hub_model_id"] == "org/m"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {name_or_path: m}\ndata: {source: a/b}\n", "is a recipe already"),
        (
            "model_name_or_path: m\ndataset_name: a/b\nbeta: 0.1\n",
            "flat.yaml:3: 'beta' belongs to preference tuning",
        ),
        (
            "model_name_or_path: m\ndataset_name: a/b\nloss_type: ipo\n",
            "flat.yaml:3: 'loss_type' belongs to preference tuning",
        ),
        (
            "model_name_or_path: m\ndataset_name: a/b\nloss_type: [sigmoid, sft]\n",
            "flat.yaml:3: 'loss_type' belongs",
        ),
        (
            "model_name_or_path: m\ndataset_name: a/b\nnum_generations: 4\n",
            "flat.yaml:3: 'num_generations' belongs",
        ),
        (
            "model_name_or_path: m\ndataset_name: a/b\noutput_dir: data/zephyr-7b-dpo-full\n",
            "flat.yaml:3: 'output_dir' says dpo",
        ),
        (
            "model_name_or_path: m\ndataset_name: a/b\nhub_model_id: Qwen-Reward\n",
            "flat.yaml:3: 'hub_model_id' says Reward",
        ),
        ("dataset_name: a/b\nlearning_rate: 1e-5\n", "no model_name_or_path"),
        ("model_name_or_path: m\n", "names no data"),
        ("", "holds no keys"),
        ("a: [1\n", "never closed"),
        ("learning_rate: 1\nlearning_rate: 2\n", "duplicate key"),
    ],
)
def test_what_cannot_become_a_recipe_is_refused_by_name(text, words, tmp_path):
    source, output = tmp_path / "flat.yaml", tmp_path / "recipe.yaml"
    source.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        run_migrate(source, output)
    assert words in str(raised.value)
    assert str(raised.value).startswith(str(source))
    assert not output.exists()


def test_an_existing_file_is_replaced_only_with_force(tmp_path):
    output = tmp_path / "recipe.yaml"
    output.write_text("mine\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="exists already"):
        run_migrate(FLAT / "trl_cli.yaml", output)
    assert output.read_text(encoding="utf-8") == "mine\n"
    assert run_migrate(FLAT / "trl_cli.yaml", output, "--force") == 0


def test_schema_line_points_from_the_recipe_to_the_schema(migrated, tmp_path):
    from recipes_lib.core.project import project_root

    first = migrated("handbook")[1].splitlines()[0]
    schema = tmp_path / "out" / first.split("$schema=")[1]
    assert schema.resolve() == (project_root() / "schema" / "recipe.schema.json").resolve()


def test_what_model_init_kwargs_say_about_precision_and_attention_moves_to_the_model_section(
    migrated,
):
    flat = (
        "model_name_or_path: a/b\ndataset_name: c/d\nmodel_init_kwargs: {torch_dtype: bf16,"
        " attn_implementation: sdpa, use_cache: false}\n"
    )
    values, _, printed = migrated(flat)
    assert values["model"] == {
        "name_or_path": "a/b",
        "dtype": "bfloat16",
        "attn_implementation": "sdpa",
        "kwargs": {"use_cache": False},
    }
    assert "from model_init_kwargs.torch_dtype" in printed
    values, _, _ = migrated(
        flat.replace("model_init_kwargs", "dtype: float32\nmodel_init_kwargs").replace(
            ", use_cache: false", ""
        )
    )
    assert values["model"] == {
        "name_or_path": "a/b",
        "dtype": "float32",
        "attn_implementation": "sdpa",
    }


FOREIGN_FILES = {
    "axolotl": (
        "base_model: org/m\ndatasets:\n  - {path: org/d, type: alpaca}\nadapter: lora\nlora_r:"
        " 8\nmicro_batch_size: 2\n"
    ),
    "LLaMA-Factory": (
        "model_name_or_path: org/m\nstage: sft\nfinetuning_type: lora\nlora_rank: 8\ndataset_name:"
        " org/d\ncutoff_len: 9\n"
    ),
    "oumi": (
        "model: {model_name: org/m}\ndata: {train: {datasets: [{dataset_name: d}]}}\ntraining:"
        " {trainer_type: TRL_SFT}\n"
    ),
    "torchtune": (
        "output_dir: x\nmodel:\n  _component_: torchtune.models.llama3.lora_llama3_8b\n  lora_rank:"
        " 8\nbatch_size: 2\n"
    ),
}


@pytest.mark.parametrize("program", FOREIGN_FILES)
def test_a_file_of_another_program_is_named_and_its_way_here_shown(program, tmp_path, capsys):
    """By every verb that is given it, and with the same words."""
    source = tmp_path / "theirs.yaml"
    source.write_text(FOREIGN_FILES[program], encoding="utf-8")
    for argv in (
        ["check", str(source)],
        ["show", str(source)],
        ["migrate", str(source), "--output", str(tmp_path / "out.yaml")],
    ):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert (
            f"{program} config, not a" in said
            and "recipes new NAME" in said
            and "recipes migrate" not in said
        ), said
    assert not (tmp_path / "out.yaml").exists()


def test_keys_of_trls_other_trainers_are_known():
    """A flat file with one of them must not become supervised fine-tuning."""
    import trl

    both = {"chat_template_kwargs"}  # TRL's SFT reads it from the rows
    names = [
        name
        for name in dir(trl)
        if name.endswith("Config")
        and name not in ("SFTConfig", "ModelConfig", "DatasetMixtureConfig")
    ]
    sft = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    for name in names:
        own = {field.name for field in dataclasses.fields(getattr(trl, name))} - sft - both
        assert own and own <= OTHER_TRAINERS, (name, sorted(own - OTHER_TRAINERS))
    assert not OTHER_TRAINERS & sft
    assert not OTHER_LOSSES & set(subschema("train", "loss_type")["enum"])


def test_what_acts_on_conversations_alone_is_left_behind_where_rows_are_texts(migrated, tmp_path):
    flat = (
        "model_name_or_path: a/b\ndataset_name: c/d\ndataset_text_field: body\nsystem_prompt: Be"
        " nice\nchat_template: x\n"
    )
    values, text, said = migrated(flat)
    assert (
        values["data"]["prompt_format"] == "raw"
        and not {"system_prompt", "chat_template"} & values["data"].keys()
    )
    assert (
        "system_prompt NOT CARRIED OVER; it acts on conversations alone" in said
        and "#     system_prompt: Be nice" in text
    )
    assert main(["check", str(tmp_path / "out" / "recipe.yaml")]) == 0
