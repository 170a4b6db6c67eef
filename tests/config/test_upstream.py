from __future__ import annotations

import dataclasses
import json

import pytest

from recipes_lib.config import upstream
from recipes_lib.config.check import check_upstream
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import EnvironmentFault, RecipeError

QLORA = """\
model: {name_or_path: a/b}
data: {source: b}
lora: {r: 4, target_modules: [q_proj]}
quantization:
  load_in_4bit: true
  bnb_4bit_compute_dtype: bfloat16
"""


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    """The tests are the same with and without a GPU."""
    monkeypatch.setattr(upstream, "has_accelerator", lambda: False)


def test_sft_config_gets_the_recipe_and_what_the_machine_decides(write_with, tmp_path):
    recipe = load_recipe(
        write_with("train", "learning_rate: 3e-4"),
        ["run.global_batch_size=64", "train.per_device_train_batch_size=4"],
    )
    args = upstream.build_sft_config(recipe, tmp_path / "out", world_size=2)
    assert (args.learning_rate, args.seed, args.gradient_accumulation_steps) == (3e-4, 1, 8)
    assert (args.use_cpu, args.bf16, args.activation_checkpointing) == (True, True, False)
    assert args.output_dir == str(tmp_path / "out")
    assert args.run_name == recipe.name
    assert args.dataset_kwargs == {"skip_prepare_dataset": True}
    assert args.logging_nan_inf_filter is False


def test_padding_free_rows_arrive_truncated_so_trl_gets_no_limit(write_with, tmp_path):
    recipe = load_recipe(write_with("train", "padding_free: true"), ["train.max_length=128"])
    assert upstream.build_sft_config(recipe, tmp_path, 1).max_length is None
    assert recipe.train["max_length"] == 128
    packed = dataclasses.replace(recipe, train={**recipe.train, "packing": True})
    assert upstream.build_sft_config(packed, tmp_path, 1).max_length == 128


def test_one_process_uses_one_gpu_however_many_there_are(write_with, tmp_path, monkeypatch):
    """transformers would wrap the model in nn.DataParallel, and a step would have eight times the
    examples declared.
    """
    import torch

    monkeypatch.setattr(upstream, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    recipe = load_recipe(
        write_with("train", "bf16: false"),
        ["run.global_batch_size=4", "train.per_device_train_batch_size=4"],
    )
    args = upstream.build_sft_config(recipe, tmp_path, 1)
    assert (args.use_cpu, args.n_gpu, args.train_batch_size, args.gradient_accumulation_steps) == (
        False,
        1,
        4,
        1,
    )


def test_what_upstream_says_is_told_in_full(write_with):
    """Its message goes on after the first line."""
    error = ValueError(
        "--load_best_model_at_end requires the strategies to match, but found\n- Evaluation: no\n-"
        " Save: steps"
    )
    told = upstream.refused(
        load_recipe(write_with("train", "load_best_model_at_end: false")), "train", error
    )
    assert told.what.endswith("but found - Evaluation: no - Save: steps") and told.line == 8


@pytest.mark.parametrize(
    ("section", "line", "words"),
    [
        ("train", "fp16: true", ["r.yaml:8: ", "does nothing on a CPU", "bf16"]),
        ("train", "dataloader_prefetch_factor: 2", ["r.yaml:8: ", "dataloader_num_workers"]),
        ("run", "global_batch_size: 10", ["r.yaml:10: ", "10 / (8 per device x 1 processes = 8)"]),
    ],
)
def test_what_trl_or_the_machine_refuses_is_placed_at_its_key(
    section, line, words, write_with, tmp_path
):
    with pytest.raises(RecipeError) as caught:
        upstream.build_sft_config(load_recipe(write_with(section, line)), tmp_path, 1)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train.fp16=true", "train.bf16=false"],
            ["cannot compute in fp16", "rounded to float16", "launch with ddp"],
        ),
        (
            ["quantization.load_in_4bit=false", "quantization.load_in_8bit=true"],
            ["8-bit", "scales", "launch with ddp"],
        ),
    ],
)
def test_quantized_weights_that_fsdp_would_change_are_refused(write, overrides, words):
    """FSDP2 gathers every floating tensor in the compute type: bf16 bits that hold 4-bit values are
    others after a cast to fp16.
    """
    recipe = load_recipe(write(QLORA), ["quantization.bnb_4bit_quant_storage=bfloat16", *overrides])
    sharded = dataclasses.replace(
        recipe, launch=dataclasses.replace(recipe.launch, accelerate="fsdp_qlora")
    )
    assert not [error for error in check_upstream(recipe) if "FSDP" in error.what]
    [error] = [error for error in check_upstream(sharded) if "FSDP" in error.what]
    assert not [word for word in words if word not in str(error)], str(error)


def test_lora_and_quantization_become_the_real_objects(write):
    recipe = load_recipe(
        write(QLORA),
        [
            "quantization.llm_int8_threshold=5",
            "lora.init_lora_weights=eva",
            "lora.eva_config={rho: 3.0}",
        ],
    )
    lora, quantization = (
        upstream.build_lora_config(recipe),
        upstream.build_quantization_config(recipe),
    )
    assert (lora.r, lora.target_modules, lora.task_type, lora.eva_config.rho) == (
        4,
        {"q_proj"},
        "CAUSAL_LM",
        3.0,
    )
    assert str(quantization.bnb_4bit_compute_dtype) == "torch.bfloat16"
    assert quantization.llm_int8_threshold == 5.0


def test_full_fine_tuning_has_neither(write):
    recipe = load_recipe(write("model: {name_or_path: a}\ndata: {source: b}\nlora: null\n"))
    assert upstream.build_lora_config(recipe) is None
    assert upstream.build_quantization_config(recipe) is None


def test_peft_has_the_last_word(write_with):
    with pytest.raises(RecipeError) as caught:
        upstream.build_lora_config(load_recipe(write_with("lora", "layers_pattern: h")))
    assert str(caught.value).startswith("r.yaml:6: lora: ")


def test_qlora_under_fsdp_needs_bfloat16_storage(write):
    recipe = load_recipe(write(QLORA), ["launch.accelerate=fsdp"])
    [error] = check_upstream(recipe)
    assert str(error).startswith("r.yaml:5: QLoRA under FSDP")
    assert "bnb_4bit_quant_storage: bfloat16" in str(error)
    fixed = load_recipe(
        "r.yaml", ["launch.accelerate=fsdp", "quantization.bnb_4bit_quant_storage=bfloat16"]
    )
    assert not check_upstream(fixed)
    assert not check_upstream(load_recipe("r.yaml", ["launch.accelerate=ddp"]))


def test_a_model_that_is_not_here_is_a_note_and_no_error(write):
    notes: list[RecipeError] = []
    assert not check_upstream(load_recipe(write()), notes=notes)
    assert "meta-llama/Llama-2-7b-hf is not on this machine: names not checked" in notes[0].what


def test_what_only_a_gpu_can_judge_is_a_note_unless_the_launch_is_for_the_cpu(write_with):
    notes: list[RecipeError] = []
    path = write_with("train", "fp16: true")
    assert not check_upstream(load_recipe(path), notes=notes)
    assert any("train.fp16 not checked" in note.what for note in notes)
    [error] = check_upstream(load_recipe(path, ["launch.accelerate=cpu"]))
    assert "does nothing on a CPU" in error.what


def test_the_default_launch_decides_the_batch_arithmetic(write):
    errors = check_upstream(
        load_recipe(write(), ["launch.accelerate=ddp", "launch.gpus=3", "run.global_batch_size=64"])
    )
    assert "64 / (8 per device x 3 processes = 24)" in str(errors[0])


def local(write, folder, *overrides: str):
    return load_recipe(write(QLORA.replace("a/b", str(folder)).split("quantization")[0]), overrides)


def test_names_are_checked_against_a_local_model(write, tiny_model_dir):
    assert not check_upstream(local(write, tiny_model_dir))
    [error] = check_upstream(local(write, tiny_model_dir, "lora.target_modules=[q_proj, qq_proj]"))
    assert "the model has no module 'qq_proj'" in error.what
    assert "did you mean q_proj?" in str(error)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(error)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.target_modules='.*attention_x.*'", "no module '.*attention_x.*'"),
        ("lora.modules_to_save=[head]", "no module 'head'"),
        ("lora.layers_to_transform=[0, 5]", "no layer 5"),
    ],
)
def test_other_lora_names_are_checked_too(override, words, write, tiny_model_dir):
    [error] = check_upstream(local(write, tiny_model_dir, override))
    assert words in error.what
    assert error.file == "command line"


@pytest.mark.parametrize("targets", ["all-linear", "'.*_proj'", "[self_attn.q_proj]"])
def test_every_form_of_target_that_peft_takes_is_taken(targets, write, tiny_model_dir):
    assert not check_upstream(local(write, tiny_model_dir, f"lora.target_modules={targets}"))


def test_an_fsdp_layer_class_must_exist_in_the_model(write, tiny_model_dir, tmp_path):
    config = tmp_path / "fsdp.yaml"
    config.write_text(
        "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_state_dict_type:"
        " FULL_STATE_DICT\n  fsdp_transformer_layer_cls_to_wrap: MistralDecoderLayer\n"
    )
    [error] = check_upstream(local(write, tiny_model_dir, f"launch.accelerate={config}"))
    assert "MistralDecoderLayer" in error.what
    assert "LlamaDecoderLayer" in str(error)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(write, tiny_model_dir, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_model_dir, tmp_path / "grown")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {
        "id": len(tokenizer["model"]["vocab"]),
        "content": "<|extra|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
    }
    tokenizer["added_tokens"].append({**added, "normalized": False, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    [error] = check_upstream(local(write, folder))
    assert "the tokenizer has 513 entries, the model embeds only 512" in error.what
    assert "model.resize_embeddings: true" in str(error)
    assert not check_upstream(local(write, folder, "model.resize_embeddings=true"))


def test_code_that_ships_with_a_model_is_never_run_by_a_check(write, tiny_model_dir):
    notes: list[RecipeError] = []
    assert not check_upstream(
        local(write, tiny_model_dir, "model.trust_remote_code=true", "lora.target_modules=[zz]"),
        notes=notes,
    )
    assert "brings its own code: names not checked" in notes[0].what


@pytest.mark.parametrize(
    ("section", "line", "words"),
    [
        (
            "train",
            "use_liger_kernel: true",
            ["r.yaml:8: ", "liger-kernel is not installed", "[gpu]"],
        ),
        (
            "model",
            "attn_implementation: kernels-community/flash-attn2",
            ["r.yaml:2: ", "the package kernels>=", "; it is not installed", "leave the key out"],
        ),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    section, line, words, write_with, capsys, monkeypatch
):
    """By the full check and at the start of a training, each with its own exit code."""
    import transformers.utils

    from recipes_lib.cli import main
    from recipes_lib.train import main as train

    for name in ("is_kernels_available", "is_liger_kernel_available"):
        monkeypatch.setattr(transformers.utils, name, lambda: False)
    path = str(write_with(section, line))
    for entry, code in ((lambda: main(["check", "--full", path]), 2), (lambda: train([path]), 5)):
        assert entry() == code
        said = capsys.readouterr().err
        assert not [word for word in words if word not in said], said


def test_a_version_of_kernels_that_transformers_does_not_take_is_named_before_a_training(
    write_with, capsys, monkeypatch
) -> None:
    import importlib.metadata

    import transformers.utils

    from recipes_lib.config.upstream import check_packages

    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.2")
    path = write_with("model", "attn_implementation: kernels-community/flash-attn2")
    with pytest.raises(EnvironmentFault, match=r"kernels>=.*, and 0\.17\.2 is installed"):
        check_packages(load_recipe(path))
