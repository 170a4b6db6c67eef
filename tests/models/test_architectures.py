"""What is particular to an architecture: targets left out of all-linear, attention by class, rows
that must not be shared.
"""

import copy
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tests.conftest import PROJECT
from tests.families import FAMILIES, family_config

from recipes_lib.models.families import (
    adds_router_loss,
    describe_targets,
    needs_of,
    not_quantized,
    prepare_for_training,
    ready_to_answer,
    settle_targets,
    short_name,
    why_rows_apart,
)
from recipes_lib.training.attention import examples_are_read_by_others


@lru_cache
def without_weights(family: str) -> Any:
    import transformers

    config = family_config(family)
    with torch.device("meta"):
        return getattr(transformers, needs_of(config.model_type).auto_class).from_config(config)


def with_weights(family: str) -> Any:
    """A family's model with random weights."""
    import transformers

    torch.manual_seed(0)
    config = family_config(family)
    return getattr(transformers, needs_of(config.model_type).auto_class).from_config(config)


def adapted(family: str, **lora: Any) -> Any:
    """A family's model with adapters as a recipe puts them on, without weights."""
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(without_weights(family))
    common = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = LoraConfig(**{**common, "target_modules": "all-linear", **lora})
    with torch.device("meta"):
        return get_peft_model(model, settle_targets(config, model))


def left_out(model: Any) -> list[str]:
    """The layers of a model with adapters that have none."""
    adapters = describe_targets(model).removeprefix("adapters on ").split(", ")
    base, needs = model.get_base_model(), needs_of(model.config.model_type)
    embeddings = [module for module in base.modules() if isinstance(module, torch.nn.Embedding)]
    passed_by = {id(layer.weight) for layer in (*embeddings, base.get_output_embeddings())}
    parts = {"lora_A", "lora_B", *needs.images}
    names = [
        short_name(name)
        for name, weight in base.named_parameters()
        if weight.ndim == (2 if name.endswith(".weight") else 3)
        and id(weight) not in passed_by
        and not parts & {*name.split(".")}
    ]
    without = [name for name in dict.fromkeys(names) if name not in adapters]
    return [*without, *needs.without_adapter, *needs.images]


def test_all_linear_leaves_out_what_takes_no_adapter() -> None:
    attention = "adapters on q_proj, k_proj, v_proj, o_proj"
    dense = f"{attention}, gate_proj, up_proj, down_proj"
    for family, expected, left in (
        ("llama", dense, []),
        ("gpt_oss", attention, ["router", "experts.gate_up_proj", "experts.down_proj"]),
        ("mamba2", "adapters on in_proj", ["out_proj"]),
        ("llama4_text", dense, ["experts.gate_up_proj", "experts.down_proj", "router"]),
        # PEFT's all-linear takes the router too, and merges and saves it wrongly
        ("qwen3_moe", f"{attention}, experts.down_proj, experts.gate_up_proj", ["gate"]),
    ):
        model = adapted(family)
        assert (describe_targets(model), left_out(model)) == (expected, left)
    experts = adapted("qwen3_moe", r=4).named_parameters()
    ranks = {len(value) / 4 for name, value in experts if "experts" in name and "lora_A" in name}
    assert ranks == {4, 8}, "gate and up are one matrix of four experts, and keep a rank each"


def test_targets_that_a_user_names_stay_as_they_are_and_exclusions_are_added_to_his() -> None:
    for excluded in (["k_proj"], r".*\.[kx]_proj"):
        model = adapted("falcon_h1", exclude_modules=excluded)
        names = {name.rpartition(".")[2] for name in model.targeted_module_names}
        assert {"q_proj", "v_proj"} <= names and not names & {"k_proj", "out_proj"}, excluded
    assert describe_targets(adapted("gpt_oss", target_modules=["q_proj"])) == "adapters on q_proj"


def test_layers_that_peft_cannot_load_take_no_adapter_though_a_user_names_them() -> None:
    for targets in ("all-linear", ["q_proj", "down_proj"], r".*\.down_proj"):
        names = adapted("laguna", target_modules=targets).targeted_module_names
        assert any(name.endswith("mlp.down_proj") for name in names), targets
        assert not any("shared_experts" in name for name in names), targets


def test_examples_share_no_row_of_a_model_that_compresses_tokens() -> None:
    """The experiment's 16 tokens are fewer than the 128 that such a layer makes one of."""
    assert why_rows_apart(without_weights("deepseek_v4"))


def row_of(family: str) -> str:
    """The row of docs/models.md that the code gives for a family, without the models' names."""
    model, adapters = without_weights(family), describe_targets(adapted(family))
    left = ", ".join(left_out(adapted(family)))
    alone = "; experts " + ("adapted" if "experts" in adapters else "not")
    experts = any("experts" in name for name, _ in model.named_parameters())
    why = why_rows_apart(model)
    if why is None and examples_are_read_by_others(with_weights(family)):
        why = "one example reads another"
    together = f"no: {why}" if why else "yes"
    rest = f"{left or '-'}{alone if experts else ''}"
    return f"| {family} | {rest} | {together.partition(' from ')[0]} |"


def test_the_table_of_models_says_what_the_code_does() -> None:
    """The slow tests train each of them by LoRA, QLoRA and as a whole (test_families.py)."""
    text = (PROJECT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 5]
    rows_of_page = {line.split(" | ")[1]: line.partition(" | ")[2] for line in rows[1:]}
    assert {family: f"| {row}" for family, row in rows_of_page.items()} == {
        family: row_of(family) for family in FAMILIES
    }


def test_a_model_that_answers_is_without_the_routers_loss() -> None:
    model = copy.deepcopy(without_weights("mixtral"))
    model.config.output_router_logits = True
    assert not ready_to_answer(model).config.output_router_logits


REFUSED = (
    ("llama4_text", "lora.target_modules=[q_proj, router]", "'router' takes no adapter: it"),
    ("deepseek_v4", "lora.target_modules=[q_a_proj, o_a_proj]", "'o_a_proj' takes no adapter"),
    ("mamba2", "lora.target_modules=[in_proj, out_proj]", "'out_proj' takes no adapter"),
    ("nemotron_h", "lora.target_modules=.*proj", "'out_proj'"),
    ("falcon_h1", "train.packing=true", "FalconH1ForCausalLM has layers that carry a state"),
    ("qwen3_next", "train.padding_free=true", "layers that carry a state"),
    ("bart", "train.padding_free=true", "BartForCausalLM takes no positions"),
    ("bloom", "train.packing=true", "BloomForCausalLM takes no positions"),
    ("qwen3_moe", "lora.target_modules=[gate_proj]", "without also targeting up_proj"),
    ("qwen3_moe", "lora.init_lora_weights=pissa", "'Qwen3MoeExperts' object"),
    ("qwen3_moe", "lora.lora_dropout=0.05", "does not work with lora_dropout"),
    ("qwen3_moe", "lora.use_dora=true", "does not work with use_dora"),
)


def complaints(family: str, *words: str, recipe: Path, tokenizer: Path, folder: Path) -> list[str]:
    """What `recipes check` says of a recipe for a family's model, whose weights are not there."""
    from recipes_lib.config.launch import plan_launch
    from recipes_lib.config.preflight import check_names, planned_launch
    from recipes_lib.config.recipe import load_recipe

    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    family_config(family).save_pretrained(folder)
    words = ("lora.target_modules=all-linear", *words, f"model.name_or_path={folder}")
    loaded = load_recipe(recipe, list(words))
    errors = check_names(loaded, folder, planned_launch(plan_launch(loaded.launch)))
    return [error.what for error in errors]


def test_what_an_architecture_cannot_do_is_one_line_before_anything_is_loaded(
    tiny_recipe, tiny_model_dir, tmp_path
) -> None:
    missed = []
    for number, (family, override, said) in enumerate(REFUSED):
        places = {"recipe": tiny_recipe, "tokenizer": tiny_model_dir}
        whats = complaints(family, override, **places, folder=tmp_path / str(number))
        if len(whats) != 1 or said not in whats[0] or "\n" in whats[0]:
            missed.append((family, override, whats))
    assert not missed


def test_each_architecture_has_no_complaint_about_a_plain_recipe(
    tiny_recipe, tiny_model_dir, tmp_path
) -> None:
    places = {"recipe": tiny_recipe, "tokenizer": tiny_model_dir}
    for family in (*FAMILIES, "gpt_neox"):  # its config says is_decoder: false, and it is causal
        assert not complaints(family, **places, folder=tmp_path / family), family


def test_text_trains_the_language_model_alone_of_a_model_that_reads_images() -> None:
    """Its tower of images has layers of the same names, and no gradient from text: two processes
    would wait for it.
    """
    images = ("k_proj", "vision", "audio", "projector")
    wrong = []
    for family in (name for name, values in FAMILIES.items() if "vision_config" in values):
        for targets in ("all-linear", ["q_proj", "v_proj"], r".*\.[qv]_proj"):
            model = adapted(family, target_modules=targets, exclude_modules=["k_proj"])
            names = model.targeted_module_names
            if not names or any(part in name for name in names for part in images):
                wrong.append((family, targets, names))
        whole = copy.deepcopy(without_weights(family))
        prepare_for_training(whole)
        frozen = {name for name, weight in whole.named_parameters() if not weight.requires_grad}
        beside = {
            name
            for name, _ in whole.named_parameters()
            if "language_model" not in name and "lm_head" not in name
        }
        # transformers has classes for the text of Qwen3.5 and Llama 4 that leave the images out
        if frozen != (beside if "vision_config" in whole.config.to_dict() else set()):
            wrong.append((family, frozen))
    assert not wrong


def test_the_routers_loss_is_added_where_the_config_asks_or_routers_are_trained() -> None:
    """TRL adds it wherever the config has a coefficient: 0.9 for gpt-oss, whose routers LoRA
    freezes.
    """
    model = copy.deepcopy(without_weights("gpt_oss"))
    assert not adds_router_loss(model, lora={"r": 8}) and adds_router_loss(model, lora=None)
    model.config.output_router_logits = True
    assert adds_router_loss(model, lora={"r": 8})


def test_what_a_kernel_reads_or_reads_images_stays_out_of_quantization() -> None:
    """Mamba multiplies by dt_proj's weight itself, and a packed one has another shape."""
    images = [rf".*\.{part}" for part in ("vision_tower", "multi_modal_projector")]
    plain = {"mamba": ["out_proj", "x_proj", "dt_proj"], "gemma3": images}
    for family in ("mamba", "gemma3", "llama4_text", "llama"):
        expected = ["lm_head", *plain[family]] if family in plain else []
        assert not_quantized(without_weights(family).config) == expected
