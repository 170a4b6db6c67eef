from __future__ import annotations

import pytest

from recipes_lib.config.flat import flat_form, flat_text
from recipes_lib.config.recipe import load_recipe

QLORA = """\
model: {name_or_path: a/b, dtype: bfloat16}
data: {source: some/data, prompt_format: chat, chat_template: t.jinja}
lora: {r: 4, lora_alpha: 8, target_modules: [q_proj], rank_pattern: {q_proj: 2}}
quantization: {load_in_4bit: true, bnb_4bit_use_double_quant: true, bnb_4bit_compute_dtype: bfloat16}
train: {learning_rate: 1e-4, per_device_train_batch_size: 4}
run: {global_batch_size: 64}
launch: {accelerate: ddp}
"""  # noqa: E501


def test_sections_become_trl_flags(write):
    flat, lost = flat_form(load_recipe(write(QLORA)))
    assert flat["model_name_or_path"] == "a/b"
    assert flat["dataset_name"] == "some/data"
    assert (flat["use_peft"], flat["lora_r"], flat["lora_alpha"], flat["lora_target_modules"]) == (
        True,
        4,
        8,
        ["q_proj"],
    )
    assert (flat["load_in_4bit"], flat["use_bnb_nested_quant"]) == (True, True)
    assert (flat["learning_rate"], flat["gradient_accumulation_steps"]) == (1e-4, 8)
    assert flat["activation_checkpointing"] is False
    assert set(lost) >= {
        "data.prompt_format",
        "data.chat_template",
        "lora.rank_pattern.q_proj",
        "quantization.bnb_4bit_compute_dtype",
    }


def test_what_cannot_be_said_is_a_comment(write):
    text = flat_text(load_recipe(write(QLORA)), "r.yaml")
    assert "#   data.prompt_format: chat" in text
    assert text.startswith(
        "# r.yaml as a plain TRL config: trl sft --config FILE --accelerate_config"
        " accelerate_configs/ddp.yaml"
    )


def test_a_mixture_and_filters_are_comments_too(write):
    mixture = QLORA.replace(
        "source: some/data",
        "source: [{source: a/b}, {source: c/d}], filters: {categories: [open_qa]}",
    )
    flat, lost = flat_form(load_recipe(write(mixture)))
    assert "dataset_name" not in flat
    assert lost["data.source"] == [{"source": "a/b"}, {"source": "c/d"}] and lost[
        "data.filters.categories"
    ] == ["open_qa"]


def test_a_template_argument_that_is_false_is_a_comment_too():
    _, lost = flat_form(
        load_recipe("quickstart/lora-r8", ["data.chat_template_kwargs={enable_thinking: false}"])
    )
    assert lost["data.chat_template_kwargs.enable_thinking"] is False


@pytest.mark.parametrize(
    "name", ["llama2-7b-dolly/qlora-r8", "llama2-7b-dolly/full-bf16", "quickstart/lora-r8"]
)
def test_trl_itself_takes_the_flat_file(name, tmp_path):
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    recipe = load_recipe(name)
    path = tmp_path / "flat.yaml"
    path.write_text(flat_text(recipe, name))
    script, args, model = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig)
    ).parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    assert not model.model_name_or_path.startswith("package:"), (
        "a name of ours that TRL would look for on the Hub"
    )
    assert script.dataset_name == recipe.to_dict()["data"]["source"]
    assert args.learning_rate == recipe.train["learning_rate"]
    assert model.use_peft == (recipe.lora is not None)
