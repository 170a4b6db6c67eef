"""The stages of a recipe: `train` is another class of TRL, and what cannot act is refused."""

import dataclasses
import json

import pytest

from recipes_lib.config import upstream
from recipes_lib.config.recipe import DPO, SFT, load_recipe
from recipes_lib.config.upstream_sections import TrainSection, preference_section
from recipes_lib.core.errors import RecipeErrors
from recipes_lib.core.project import project_root
from recipes_lib.training import resume_guard

PAIRS = """\
stage: dpo
model:
  name_or_path: meta-llama/Llama-2-7b-hf
data:
  source: rows.jsonl
  prompt_format: chat
lora:
  r: 8
train:
  beta: 0.05
  use_cpu: true
"""


def errors_of(word: str) -> str:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe("r.yaml", [word])
    return str(caught.value)


def test_a_stage_has_every_key_of_its_class_or_refuses_it_with_a_reason():
    from trl import DPOConfig

    names = {field.name for field in dataclasses.fields(DPOConfig)}
    section = preference_section()
    assert names - section.gone.keys() == {*section.model_fields}
    defaults = DPOConfig(output_dir="unused", use_cpu=True)
    for key in ("learning_rate", "beta", "max_length", "disable_dropout"):
        assert section.model_fields[key].default == getattr(defaults, key)
    assert TrainSection.model_fields["learning_rate"].default != defaults.learning_rate


def test_a_recipe_of_pairs_becomes_the_arguments_of_its_trainer_and_a_recipe_again(write, tmp_path):
    from trl import DPOConfig

    write(PAIRS)
    recipe = load_recipe("r.yaml", ["train.loss_type=[sigmoid, ipo]", "train.max_length=64"])
    assert recipe.stage == DPO
    args = upstream.build_train_config(recipe, tmp_path, 1)
    assert isinstance(args, DPOConfig) and args.loss_type == ["sigmoid", "ipo"]
    assert args.beta == 0.05 and args.max_length is None  # rows arrive cut
    recipe.write(tmp_path / "resolved.yaml")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again.stage == DPO and again.to_dict() == recipe.to_dict()


def test_a_recipe_of_pairs_extends_one_of_sft_and_drops_its_keys_by_null(write):
    write(
        PAIRS.replace("stage: dpo\n", "").replace("beta: 0.05", "completion_only_loss: true"),
        "sft.yaml",
    )
    write("extends: sft.yaml\nstage: dpo\ntrain: {beta: 0.05}\n")
    with pytest.raises(RecipeErrors, match=r"(?s)cannot be set here.*null drops"):
        load_recipe("r.yaml")
    write("extends: sft.yaml\nstage: dpo\ntrain: {beta: 0.05, completion_only_loss: null}\n")
    recipe = load_recipe("r.yaml")
    assert recipe.stage == DPO and recipe.train["beta"] == 0.05
    assert "completion_only_loss" not in recipe.to_dict()["train"]
    assert errors_of("train.packing=true").count("cannot be set here") == 1


def test_the_stage_is_guarded_and_runs_of_one_stage_keep_their_record(write):
    write(PAIRS)
    recipe = load_recipe("r.yaml")
    assert resume_guard._recipe_values(recipe)["stage"] == DPO
    of_sft = dataclasses.replace(recipe, stage=SFT)
    assert "stage" not in of_sft.to_dict()
    before = resume_guard._recipe_values(of_sft)
    assert resume_guard.recipe_differences(recipe, before) == {"stage": (None, DPO)}


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("train.packing=true", "acts in stage sft"),
        ("train.padding_free=true", "does not have it"),
        ("train.use_liger_kernel=true", "fused head"),
        ("train.sync_ref_model=true", "reference is the base"),
        ("train.precompute_ref_log_probs=true", "kept in the run"),
        ("train.ld_alpha=0.5", "weighs the tokens"),
        ("train.neftune_noise_alpha=5", "noise"),
        ("train.truncation_mode=keep_end", "loses its end"),
        ("train.warmup_ratio=0.1", "renamed to train.warmup_steps"),
        ("train.loss_type=aot", "micro-batch"),
        ("train.loss_type=[sigmoid, sft]", "stage sft"),
        ("train.loss_type=exo_pair", "above 0"),
        ("train.loss_type=sigmod", "loss_type"),
        ("train.loss_weights=[0.5, 0.5]", "2 train.loss_weights for 1"),
        ("train.loss_weights=[-1.0]", "greater than 0"),
        ("train.loss_weights=[0.0]", "greater than 0"),
        ("train.beta=0", "greater than 0"),
        ("train.label_smoothing=0.25", "acts only with train.loss_type"),
        ("train.discopop_tau=0.25", "acts only with train.loss_type"),
        ("train.f_alpha_divergence_coef=0.25", "acts only with train.f_divergence_type"),
        ("model.attn_implementation=varlen", "padded"),
        ("lora.layer_replication=[[0, 4], [2, 5]]", "another model"),
        ("data.split.method=published", "divides prompts"),
        ("stage=ppo", "'sft' or 'dpo'"),
    ],
)
def test_a_key_that_cannot_act_on_pairs_is_refused_by_name(write, word, why):
    write(PAIRS)
    key = word.partition("=")[0]
    assert why in errors_of(word) and (key in errors_of(word) or key == "train.loss_weights")


@pytest.mark.parametrize("loss", ["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"])
def test_a_divergence_is_refused_where_the_loss_does_not_read_it(write, loss):
    write(PAIRS + f"  loss_type: {loss}\n")
    found = errors_of("train.f_divergence_type=forward_kl")
    assert "train.f_divergence_type acts only with train.loss_type: sigmoid" in found


def test_losses_with_the_keys_that_act_on_them_are_taken(write):
    write(PAIRS)
    for words in (
        ["train.loss_type=robust", "train.label_smoothing=0.1"],
        ["train.loss_type=discopop", "train.discopop_tau=0.1"],
        ["train.f_divergence_type=alpha_divergence", "train.f_alpha_divergence_coef=0.3"],
        ["train.loss_type=[sigmoid, hinge]", "train.loss_weights=[0.2, 0.8]"],
    ):
        assert load_recipe("r.yaml", words).stage == DPO


def test_keys_of_preferences_are_explained_where_they_stand_in_the_other_stage(write, said):
    write(PAIRS)
    assert "set stage: dpo" in errors_of("stage=sft")
    for word, line in {
        "train.beta": "default 0.1 (trl.DPOConfig, in stage dpo)",
        "train.learning_rate": "in stage dpo: default 1.0e-06",
        "train.packing": "not in stage dpo",
        "stage": "sft, dpo",
    }.items():
        assert line in said("explain", word)


def test_an_editor_offers_the_keys_of_the_stage():
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(
        json.loads((project_root() / "schema/recipe.schema.json").read_text())
    )
    assert not list(validator.iter_errors({"stage": "dpo", "train": {"beta": 0.1}}))
    assert not list(validator.iter_errors({"stage": "dpo", "train": {"packing": None}}))
    assert list(validator.iter_errors({"train": {"beta": 0.1}}))
    assert list(validator.iter_errors({"stage": "dpo", "train": {"packing": True}}))


def test_a_file_of_single_answers_is_read_without_the_columns_of_pairs(write, tmp_path):
    """The training rows name their two answers; the file of an evaluation has one."""
    from recipes_lib.data.errors import BadRows
    from recipes_lib.data.reading import read_data

    write(PAIRS)
    file = tmp_path / "held-out.jsonl"
    file.write_text('{"question": "Why?", "completion": "So."}\n')
    columns = "data.columns={prompt: question, chosen: better, rejected: worse}"
    read = read_data(load_recipe("r.yaml", [columns]).reading(str(file)).data, BadRows())
    assert [row.fields for row in read.rows] == [{"prompt": "Why?", "completion": "So."}]
