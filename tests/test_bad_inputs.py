"""Bad models, machines and command lines, given to the real entry points: the exit code, the place and the key words of the answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_lib.cli import main as recipes
from recipes_lib.train import main as train

NF4 = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}"


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def truncate_shard(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bigger_vocabulary(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(8)])
    tokenizer.save_pretrained(folder)


def remote_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})


def already_quantized(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def nothing(folder: Path) -> None:
    """The fault is in the recipe."""


MODELS: dict[str, tuple[Callable[[Path], None], list[str], int, list[str]]] = {
    "55 tokenizer larger than the embeddings": (bigger_vocabulary, [], 2, ["520", "512", "model.resize_embeddings"]),
    "58 QLoRA under FSDP without a storage type": (nothing, [NF4, "launch.accelerate=fsdp_cpu"], 2, ["bnb_4bit_quant_storage", "bfloat16"]),
    "62 attention kernel that is not installed": (
        nothing, ["model.attn_implementation=flash_attention_2", "model.dtype=bfloat16"], 5, ["flash_attention_2", "not installed"],
    ),
    "64 an encoder": (lambda folder: change_config(folder, model_type="bert", architectures=["BertModel"]), [], 2, ["BertModel"]),
    "64 already quantized": (already_quantized, [], 2, ["gptq"]),
    "65 pickled weights": (pickle_weights, [], 2, ["pytorch_model.bin", "safetensors"]),
    "65 remote code without leave": (remote_code, ["model.trust_remote_code=true"], 2, ["--trust-remote-code"]),
    "66 truncated shard": (truncate_shard, [], 2, ["model.safetensors", "bytes"]),
    "66 index that names a missing shard": (missing_shard, [], 2, ["model-00002-of-00002.safetensors"]),
    "16 a target module that the model has not": (nothing, ["lora.target_modules=[q_prj]"], 2, ["q_prj", "q_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_trained_is_refused_before_it_is_loaded(
    case: str, tiny_recipe: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, overrides, code, words = MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    damage(folder)
    assert train([str(tiny_recipe), f"model.name_or_path={folder}", *overrides]) == code
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said


LINES: dict[str, tuple[list[str], int, list[str]]] = {
    "60 a batch that does not divide": (["train", "{recipe}", "run.global_batch_size=9"], 2, ["9 / (4 per device x 1", "8 or 12"]),
    "53 an offline data set": (["train", "{recipe}", "data.source=nobody/nothing"], 4, ["offline", "data.source"]),
    "63 an offline model": (["train", "{recipe}", "model.name_or_path=nobody/nothing"], 5, ["offline", "nobody/nothing", "hf download"]),
    "63 a folder that is not there": (["train", "{recipe}", "model.name_or_path=./nowhere"], 2, ["./nowhere"]),
    "91 a run name out of the folder": (["train", "{recipe}", "run.name=../../etc"], 2, ["../../etc"]),
    "93 a value like a flag": (["train", "{recipe}", "run.name=--foo"], 2, ["run.name"]),
    "93 a value like a command": (["train", "{recipe}", "run.name=$(touch x)"], 2, ["run.name"]),
    "a bare TRL flag": (["train", "{recipe}", "--learning_rate=1e-4"], 2, ["train.learning_rate"]),
    "an unknown verb": (["trian", "{recipe}"], 2, ["train"]),
    "an unknown flag": (["check", "--ful", "{recipe}"], 2, ["--full"]),
    "an unknown launch": (["train", "{recipe}", "--accelerate", "dpp_cpu"], 2, ["ddp_cpu"]),
    "an unknown run": (["status", "nothing"], 2, ["nothing"]),
    "talk to a run that is not there": (["chat", "nothing", "--prompt", "x"], 2, ["nothing"]),
    "a recipe that is not there": (["train", "nowhere.yaml"], 2, ["nowhere.yaml"]),
    "35 an accelerate config as a recipe": (["train", "{configs}/ddp.yaml"], 2, ["accelerate config"]),
}


@pytest.mark.parametrize("case", LINES)
def test_a_bad_command_line_gets_one_answer(case: str, tiny_recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, code, expected = LINES[case]
    configs = Path(__file__).resolve().parents[1] / "accelerate_configs"
    argv = [word.format(recipe=tiny_recipe, configs=configs) for word in words]
    assert exit_code(argv) == code
    said = capfd.readouterr().err
    assert all(word in said for word in expected), said
    assert "Traceback" not in said and not (tiny_recipe.parent / "x").exists()


def exit_code(argv: list[str]) -> int:
    try:
        return recipes(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_a_model_without_a_padding_token_trains_and_still_learns_to_stop(tiny_recipe: Path, tmp_path: Path) -> None:
    """Case 54: the padding token becomes the end token, which must keep its loss."""
    assert train([str(tiny_recipe), "train.max_steps=1"]) == 0
    audit = json.loads((tmp_path / "runs" / "tiny" / "supervision.json").read_text())
    end = audit["end_token_supervised"]
    assert end["of_which_supervised"] == end["untruncated_rows"] > 0


def test_a_grown_vocabulary_trains_when_the_recipe_says_so(tiny_recipe: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    bigger_vocabulary(folder)
    assert train([str(tiny_recipe), f"model.name_or_path={folder}", "model.resize_embeddings=true", "train.max_steps=1"]) == 0
