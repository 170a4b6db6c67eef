"""What upstream's classes and the model's files say, before anything is loaded."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.families import build_family

from recipes_lib.config import preflight, upstream
from recipes_lib.config.launch import Active, plan_launch
from recipes_lib.config.preflight import check_model_files, planned_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.training.launch_check import what_runs

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
QLORA = """\
model: {name_or_path: a/b}
data: {source: b}
lora: {r: 4, target_modules: [q_proj]}
quantization:
  load_in_4bit: true
  bnb_4bit_compute_dtype: bfloat16
"""


def check_upstream(recipe, launch=None, **options):
    """Check a recipe under a launch; without, under that of its own section."""
    checked = launch or planned_launch(plan_launch(recipe.launch))
    return preflight.check_upstream(recipe, launch=checked, **options)


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    """The tests are the same with and without a GPU."""
    monkeypatch.setattr(upstream, "has_accelerator", lambda: False)


def test_sft_config_gets_the_recipe_and_what_the_machine_decides(write_with, tmp_path):
    words = ["run.global_batch_size=64", "train.per_device_train_batch_size=4"]
    recipe = load_recipe(write_with("train", "learning_rate: 3e-4"), words)
    args = upstream.build_train_config(recipe, tmp_path / "out", world_size=2)
    assert (args.learning_rate, args.seed, args.gradient_accumulation_steps) == (3e-4, 1, 8)
    assert (args.use_cpu, args.bf16, args.activation_checkpointing) == (True, True, False)
    assert (args.output_dir, args.run_name) == (str(tmp_path / "out"), recipe.name)
    assert args.logging_nan_inf_filter is False
    # rows arrive truncated, and TRL would refuse a limit that it does not apply
    recipe = load_recipe(recipe.path, ["train.padding_free=true", "train.max_length=128"])
    assert upstream.build_train_config(recipe, tmp_path, 1).max_length is None
    packed = dataclasses.replace(recipe, train={**recipe.train, "packing": True})
    assert upstream.build_train_config(packed, tmp_path, 1).max_length == 128


def test_of_missing_trackers_the_first_that_is_written_is_named(write_with, monkeypatch):
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None)
    for first, trackers in {"wandb": "none, wandb, mlflow", "mlflow": "mlflow, wandb"}.items():
        recipe = load_recipe(write_with("train", f"report_to: [{trackers}]"))
        with pytest.raises(EnvironmentFault, match=f"{first} is not installed"):
            upstream.check_packages(recipe)


def test_kernels_of_a_version_that_transformers_does_not_take_are_refused(write_with, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda: False)
    recipe = load_recipe(write_with("model", "use_kernels: true"))
    with pytest.raises(EnvironmentFault, match=r"use_kernels: .* needs kernels>=\S+,<\S+\n.*pip "):
        upstream.check_packages(recipe)
    sharded = load_recipe(recipe.path, ["launch.accelerate=fsdp"])
    assert any("under FSDP one rank alone" in error.what for error in check_upstream(sharded))


def test_what_trl_2_removes_is_a_warning_with_what_to_write_instead(write_with, recipes):
    replacements = {
        "use_liger_kernel: true": "model.use_kernels: true",
        "truncation_mode: keep_end": "leave the key out",
        "loss_type: chunked_nll": "train.loss_type: nll",
        "pad_token: <pad>": "leave the key out",
    }
    for line, instead in replacements.items():
        _, _, words = recipes("check", write_with("train", line))
        assert f"r.yaml:8: warning: TRL 2.0 removes train.{line.split(':')[0]}" in words
        assert instead in words
    allowed = write_with("train", "truncation_mode: keep_start")
    assert "TRL 2.0" not in "".join(recipes("check", allowed)[1:])


def test_one_process_uses_one_gpu_however_many_there_are(write_with, tmp_path, monkeypatch):
    """transformers would wrap the model in nn.DataParallel."""
    import torch

    monkeypatch.setattr(upstream, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    recipe = load_recipe(write_with("train", "bf16: false"))
    args = upstream.build_train_config(recipe, tmp_path, 1)
    assert (args.use_cpu, args.n_gpu) == (False, 1)


def test_what_trl_peft_or_the_machine_refuses_is_placed_at_its_key(write_with, said):
    refused = {
        ("train", "fp16: true"): "r.yaml:8: train.fp16 does nothing on a CPU",
        ("train", "dataloader_prefetch_factor: 2"): "r.yaml:8: train: --dataloader_prefetch",
        ("train", "optim: galore_adamw"): "r.yaml:8: train.optim: You need to install `galore_t",
        ("train", "optim_args: foo"): "r.yaml:7: train.optim: ",
        ("train", "lr_scheduler_kwargs: {x: 1}"): "r.yaml:8: train.lr_scheduler_kwargs: ",
        ("train", "lr_scheduler_type: cosine_with_min_lr"): "One of min_lr or min_lr_rate should",
        ("lora", "layers_pattern: h"): "r.yaml:6: lora: ",
    }
    for (section, line), words in refused.items():
        path = write_with(section, line)
        path.write_text(path.read_text() + "launch: {accelerate: cpu}\n")
        assert words in said("check", "--full", path, code=2)


def test_lora_and_quantization_become_the_real_objects(write):
    recipe = load_recipe(write(QLORA))
    lora = upstream.build_lora_config(recipe)
    quantization = upstream.build_quantization_config(recipe)
    assert (lora.r, lora.target_modules, lora.task_type) == (4, {"q_proj"}, "CAUSAL_LM")
    assert str(quantization.bnb_4bit_compute_dtype) == "torch.bfloat16"


def test_quantized_weights_that_fsdp_would_change_are_refused(write):
    """FSDP2 gathers every floating tensor in the compute type."""
    stored = "quantization.bnb_4bit_quant_storage=bfloat16"
    eight = ["quantization.load_in_4bit=false", "quantization.load_in_8bit=true"]
    write(QLORA)
    for words, refused in (
        ([], "4-bit"),
        ([stored], ""),
        ([stored, "train.fp16=true", "train.bf16=false"], "train.bf16"),
        ([stored, *eight], "4-bit"),
    ):
        sharded = load_recipe("r.yaml", ["launch.accelerate=fsdp", *words])
        errors = [str(error) for error in check_upstream(sharded)]
        assert any(refused in error for error in errors) if refused else not errors, errors
        assert not check_upstream(load_recipe("r.yaml", ["launch.accelerate=ddp", *words]))


def test_what_cannot_be_checked_here_is_a_note(write_with, write, tiny_model_dir):
    notes: list[RecipeError] = []
    path = write_with("train", "fp16: true")
    assert not check_upstream(load_recipe(path), notes=notes)
    assert any("not on this machine" in note.what for note in notes)
    # code that ships with a model is never run by a check
    words = ["model.trust_remote_code=true", "lora.target_modules=[zz]"]
    notes.clear()
    assert not check_upstream(local(write, tiny_model_dir, *words), notes=notes)
    assert "brings its own code" in notes[0].what


def test_it_is_a_note_that_only_a_training_can_try_whether_examples_share_a_row(
    write, tiny_model_dir
):
    for words, said in (
        (["train.packing=true"], "note: train.packing: before the first step the training tries"),
        (["train.padding_free=true"], "note: train.padding_free: before the first step"),
        (["train.packing=true", "train.packing_strategy=wrapped"], ""),
        ([], ""),
    ):
        notes: list[RecipeError] = []
        assert not check_upstream(local(write, tiny_model_dir, *words), notes=notes)
        assert [note.what.startswith(said) for note in notes] == ([True] if said else [])


def local(write, folder: Path, *overrides: str):
    return load_recipe(write(QLORA.replace("a/b", str(folder)).split("quantization")[0]), overrides)


def test_names_are_checked_against_a_local_model(write, tiny_model_dir):
    for override, words in {
        "lora.target_modules=[q_proj, qq_proj]": "no module 'qq_proj'",  # PEFT takes it
        "lora.target_modules='.*attention_x.*'": "attention_x",
        "lora.target_modules=[]": "target_modules",
        "lora.target_modules='.*(q_proj|lm_head)'": "output layer",  # would stay untrained
        "lora.modules_to_save=[head]": "no module 'head'",
        "lora.target_modules=all-linear": "",
        "lora.target_modules='.*_proj'": "",
        "lora.target_modules=[self_attn.q_proj]": "",
    }.items():
        errors = check_upstream(local(write, tiny_model_dir, override))
        assert [error.what for error in errors if words in error.what] if words else not errors
        assert not words or errors[0].file == "command line"


def test_experts_that_quantization_leaves_as_they_are_are_a_note(write, tmp_path, tiny_model_dir):
    for family, experts in {"qwen3_moe": 2 * 4 * 3 * 64 * 32, "llama": 0}.items():
        model = build_family(family, tmp_path / family, tiny_model_dir)
        notes: list[RecipeError] = []
        recipe = load_recipe(write(QLORA.replace("a/b", str(model))))
        assert not check_upstream(recipe, notes=notes)
        said = [note.what for note in notes if "not quantized" in note.what]
        assert said == [] if not experts else f"{experts:,} parameters" in said[0]


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_damaged_missing_and_pickled_weights_are_refused(write, model):
    def problems() -> str:
        return "\n".join(map(str, check_model_files(local(write, model), model)))

    assert not problems()
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], b"", b"[" * 5000):
        weights.write_bytes(damaged)
        assert "model.safetensors is damaged or missing" in problems()
    weights.write_bytes(whole)
    (model / "training_args.bin").write_bytes(b"x")
    assert not problems()
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is damaged or missing" in problems()
    (model / "model.safetensors.index.json").unlink()
    weights.rename(model / "pytorch_model.bin")
    assert "model.safetensors is damaged or missing" in problems()


def test_a_causal_model_with_allowed_code_and_plain_weights_is_taken(write, model):
    config = json.loads((model / "config.json").read_text())
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    for values, allowed, words in (
        ({"quantization_config": {"quant_method": "mxfp4"}}, None, ""),
        ({"quantization_config": "gptq"}, None, "already quantized (gptq)"),
        ({"architectures": ["T5ForConditionalGeneration"]}, None, "not a causal language model"),
        (code, True, ""),
        (code, False, "--trust-remote-code"),
    ):
        (model / "config.json").write_text(json.dumps(config | values))
        recipe = local(write, model, "model.trust_remote_code=true")
        said = "\n".join(map(str, check_model_files(recipe, model, remote_code=allowed)))
        assert words in said if words else not said, said


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(write_with, said):
    answer = said("check", "--full", write_with("train", "report_to: [swanlab]"), code=5)
    assert "r.yaml:8: train.report_to: swanlab is not installed" in answer


def test_the_launch_that_runs_is_checked_and_not_the_recipes_default(write, tiny_model_dir):
    """`recipes train --accelerate cpu` of a recipe whose own launch is four GPUs, or FSDP."""
    alone = Active(world_size=1, distributed_type="one process", device="cpu")
    words = ["run.global_batch_size=8", "train.per_device_train_batch_size=4"]
    four = local(write, tiny_model_dir, "launch={accelerate: ddp, gpus: 4}", *words)
    assert any("multiple of" in str(error) for error in check_upstream(four))
    assert not check_upstream(four, launch=alone)

    quantized = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}"
    sharded = local(write, tiny_model_dir, "launch.accelerate=fsdp", quantized)
    assert any("FSDP keeps 4-bit" in str(error) for error in check_upstream(sharded))
    assert not check_upstream(sharded, launch=alone)


def test_layers_that_fsdp_shall_wrap_must_be_in_the_model(
    write, tiny_model_dir, tmp_path, monkeypatch
):
    config = (CONFIGS / "fsdp_cpu.yaml").read_text()
    wrap = tmp_path / "wrap.yaml"
    wrap.write_text(f"{config}  fsdp_transformer_layer_cls_to_wrap: LlamaLayer\n")
    recipe = local(write, tiny_model_dir, f"launch.accelerate={wrap}")
    (error,) = check_upstream(recipe)
    assert "LlamaLayer" in error.what and "wrap.yaml" in error.what
    assert "LlamaDecoderLayer" in error.hints[0]

    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaLayer")  # by accelerate's launcher
    running = what_runs(SimpleNamespace(num_processes=2, distributed_type="FSDP", device="cpu"))
    (error,) = check_upstream(recipe, launch=running)
    assert "LlamaLayer" in error.what
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    alone = Active(world_size=1, distributed_type="one process", device="cpu")
    assert not check_upstream(recipe, launch=alone)
