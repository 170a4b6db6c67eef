"""recipes migrate: flat TRL files of each style become recipes that train what TRL would train, and
every key and comment is accounted for.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from recipes_lib.config.documents import read
from recipes_lib.config.migrate import LORA_DEFAULTS

FLAT = Path(__file__).parent / "flat_configs"
SHORT = "model_name_or_path: a/b\ndataset_name: org/rows\n"


@pytest.fixture
def migrated(tmp_path, said):
    """Migrate a file of flat_configs, or a text: (values, text of the recipe, what was printed)."""

    def work(style: str, code: int = 0):
        source = FLAT / f"{style}.yaml"
        if "\n" in style:
            source = tmp_path / "flat.yaml"
            source.write_text(style, encoding="utf-8")
        output = tmp_path / "out" / "recipe.yaml"
        command = ["migrate", source, "--output", output]
        if output.exists():  # it is replaced only with --force
            before = output.read_bytes()
            said(*command, code=2)
            assert output.read_bytes() == before
        printed = said(*command, "--force", code=code)
        if code:
            return printed
        return read(output).values, output.read_text(encoding="utf-8"), printed

    return work


def test_every_style_passes_and_accounts_for_keys_and_comments(migrated, tmp_path, recipes):
    for path in FLAT.glob("*.yaml"):
        _, text, printed = migrated(path.stem)
        code, _, err = recipes("check", tmp_path / "out" / "recipe.yaml")
        assert code == 0 and "warning" not in err
        flat = path.read_text(encoding="utf-8")
        assert not [key for key in yaml.safe_load(flat) if f": {key} " not in printed]
        commented = [line for line in flat.splitlines() if line[:1] == "#" or "   # " in line]
        assert not [line for line in commented if line.split("# ", 1)[1] not in text]


def test_handbook_style_lands_in_the_sections(migrated):
    values, text, printed = migrated("handbook")
    flat = yaml.safe_load((FLAT / "handbook.yaml").read_text(encoding="utf-8"))
    sources = [
        {"source": "example-org/conversations", "subset": "default", "source_split": "train_sft"},
        {"source": "example-org/mathematics", "source_split": "train", "weight": 0.5},
    ]
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    for section, expected in {
        "model": {"attn_implementation": "flash_attention_2"},
        "lora": {"target_modules": ["q_proj", "v_proj"]},
        "train": {"max_length": 2048, "warmup_steps": 0.1, "packing_strategy": "bfd"},
        "data": {"chat_template": flat["chat_template"], "source": sources},
    }.items():
        assert {key: values[section][key] for key in expected} == expected
    assert values["quantization"] == nf4 and values["run"] == {"name": "small-7b-sft-qlora"}
    assert "learning_rate: 2.0e-04   # tuned on 1% of the rows" in text


# lines of a flat file -> a key of the recipe and its value
BECOMES = [
    ("eval_strategy: no", "train.eval_strategy", "no"),
    ("completion_only_loss: true", "train.completion_only_loss", True),
    ("torch_dtype: bfloat16", "model.dtype", "bfloat16"),
    ("max_seq_length: 99", "train.max_length", 99),
    ("warmup_ratio: 0.1", "train.warmup_steps", 0.1),
    ("warmup_steps: 5\nwarmup_ratio: 0.1", "train.warmup_steps", 5),
    ("use_peft: true\nlora_target_modules: [all-linear]", "lora.target_modules", "all-linear"),
    ("use_peft: true", "lora.lora_alpha", 32),
    ("dataset_text_field: body", "data.columns", {"text": "body"}),
    ("dataset_text_field: body", "data.prompt_format", "raw"),
    ("output_dir: out/my run", "run.name", "my-run"),
    ("eval_strategy: steps", "data.split", {"validation": 0.1}),
    ("dataset_mixture: [{id: x/y, weight: 0.5}, z/w]", "data.source",
     [{"source": "x/y", "weight": 0.5}, "z/w"]),
    ("gradient_checkpointing: true", "train.activation_checkpointing", True),
    ("chat_template: |-\n  {% x %}\n  # no comment\n", "data.chat_template",
     "{% x %}\n# no comment"),
]  # fmt: skip


def test_old_names_and_forms_become_todays(migrated):
    for lines, key, value in BECOMES:
        values, _, _ = migrated(f"{lines}\n{SHORT}")
        section, _, name = key.partition(".")
        assert values[section][name] == value, lines


def test_what_a_recipe_cannot_say_stays_as_a_comment_and_is_named(migrated):
    values, text, printed = migrated(
        SHORT + "learning_rte: 3\npush_to_hub: true\nhub_token: abc\nseed: &s 3\ndata_seed: *s\n"
    )
    assert "learning_rte left out" in printed and "#   learning_rte" in text
    assert "push_to_hub left out; the sections" in printed
    assert "abc" not in text + printed
    assert (values["train"]["seed"], values["train"]["data_seed"]) == (3, 3)


REFUSED = [
    (SHORT + "seed: 1\nseed: 2\n", "flat.yaml:4: duplicate key 'seed'"),
    (SHORT + "hub_token: hf_abcdefghijklmnopqrstuvwx\n", "flat.yaml:3: this looks like a secret"),
    (SHORT + "beta: 0.1\ndesirable_weight: 1.0\n", "GRPO"),
    (SHORT + "num_generations: 8\n", "GRPO"),
    (SHORT + "stage: sft\n", "LLaMA-Factory"),
    ("base_model: a\nsequence_len: 3\n", "axolotl"),
    ("model: {name_or_path: a}\n", "of kind flat, found recipe"),
    ("learning_rate: 1\n", "found unknown"),
    ("- a\n", "is not a mapping"),
]


def test_what_cannot_become_a_recipe_is_refused_by_name(migrated):
    for text, words in REFUSED:
        assert words in migrated(text, code=2), text


def test_the_adapter_of_a_silent_file_is_trls():
    from trl import ModelConfig

    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    flat = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    assert {key: defaults[name] for key, name in flat.items()} == LORA_DEFAULTS


MESSAGES = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
PAIRS = (
    '{"prompt": [{"role": "user", "content": "a"}],'
    ' "completion": [{"role": "assistant", "content": "b"}]}'
)
# a row, further lines of the flat file -> prompt_format, completion_only_loss
BY_ROWS = [
    (MESSAGES, "", "chat", False),
    (MESSAGES, "assistant_only_loss: true", "chat", None),
    (MESSAGES, "dataset_text_field: text", "chat", False),
    (MESSAGES, "completion_only_loss: true", "chat", True),
    (PAIRS, "", "chat", None),
    ('{"prompt": "a", "completion": "b"}', "", "raw", None),
    ('{"text": "a"}', "", "raw", None),
    ('{"body": "a"}', "dataset_text_field: body", "raw", None),
]


def test_rows_of_this_machine_decide_what_a_silent_file_means(migrated, tmp_path, said):
    """TRL puts no loss on a prompt that has its completion beside it, and learns all of messages;
    `completion_only_loss: false` was written for both.
    """
    for row, line, prompt_format, loss in BY_ROWS:
        (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 20)
        flat = f"model_name_or_path: a/b\ndataset_name: rows.jsonl\n{line}\n"
        values, _, printed = migrated(flat)
        assert values["data"]["prompt_format"] == prompt_format, (row, line)
        assert values.get("train", {}).get("completion_only_loss") is loss, (row, line)
        assert values["data"]["source"] == "../rows.jsonl"  # from where the recipe lies
        said("check", tmp_path / "out" / "recipe.yaml")


def test_of_rows_elsewhere_trls_default_of_the_loss_stays(migrated):
    values, text, printed = migrated(SHORT)
    assert "prompt_format" not in values["data"] and "train" not in values
    assert "not written: data.prompt_format; the rows are not on this machine" in printed
    assert "#   messages: chat, and train.completion_only_loss: false" in text
    values, _, _ = migrated(f"{SHORT}chat_template: '{{% x %}}'\n")
    assert values["data"]["prompt_format"] == "chat" and "train" not in values


def test_mixtures_of_the_handbook_and_of_trl_become_sources(migrated):
    base = "model_name_or_path: a/b\n"
    for lines, source in (
        ("dataset_mixer: {x/y: 1.0, z/w: 0.5}",
         [{"source": "x/y"}, {"source": "z/w", "weight": 0.5}]),
        ("datasets: [{path: x/y, name: de, split: test}]",
         [{"source": "x/y", "subset": "de", "source_split": "test"}]),
        ("datasets: [{path: json, data_files: a.jsonl}]", [{"source": "a.jsonl"}]),
    ):  # fmt: skip
        values, _, _ = migrated(f"{base}{lines}\n")
        assert values["data"]["source"] == source, lines
    values, _, printed = migrated(f"{base}dataset_mixer: {{x/y: 1}}\ndataset_splits: [a, b]\n")
    assert values["data"]["source_split"] == "a" and "left out" not in printed


def test_a_template_with_a_line_of_spaces_stays_as_it_is(migrated):
    block = "chat_template: |\n  A\n            \n  {% for message in messages %}\n"
    values, _, _ = migrated(f"{SHORT}{block}")
    assert values["data"]["chat_template"] == yaml.safe_load(block)["chat_template"]


def test_configs_of_pairs_become_recipes_of_stage_dpo(migrated):
    values, text, printed = migrated("handbook_dpo")
    assert values["stage"] == "dpo" and text.index("stage: dpo") < text.index("model:")
    assert "beta: 0.01   # small: far from the reference" in text
    expected = {"max_length": 1024, "loss_type": "sigmoid", "warmup_steps": 0.1}
    assert {key: values["train"][key] for key in expected} == expected
    assert values["data"]["source"] == [{"source": "example-org/preferences"}]
    assert values["data"]["source_split"] == "train_prefs"
    assert "max_prompt_length left out; TRL 1 has one limit" in printed
    assert "label_smoothing left out; it acts only with loss_type: robust" in printed
    assert "truncation_mode left out" in printed and "chosen and rejected: chat" in text
    values, _, printed = migrated("trl_dpo")
    assert values["train"]["loss_weights"] == [1.0, 0.2] and values["lora"]["lora_alpha"] == 32
    assert "precompute_ref_log_probs left out; the reference is the base" in printed


def test_local_rows_of_pairs_decide_the_stage_and_the_format(migrated, tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = "model_name_or_path: a/b\ndataset_name: {}\nlearning_rate: 1.0e-6\n"
    for name, row, prompt_format in (
        ("texts", {"prompt": "a", "chosen": "b", "rejected": "c"}, "raw"),
        ("messages", {"chosen": said, "rejected": said[:1]}, "chat"),
    ):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text(json.dumps(row) + "\n")
        values, _, _ = migrated(text.format(rows))
        assert values["stage"] == "dpo" and values["data"]["prompt_format"] == prompt_format
