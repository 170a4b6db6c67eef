"""How a base is loaded and told apart from others, and what is said where it cannot be had."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tests.conftest import NF4
from tests.weights.conftest import HALF

from recipes_lib.config.recipe import ModelSection, load_recipe
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.weights.load import (
    ADAPTER_WEIGHTS,
    attach,
    base_fingerprint,
    device_with_room,
    explain_load_failure,
    load_base,
    load_saved,
    load_tokenizer,
)


def test_why_a_model_cannot_be_had_is_said_by_the_type_of_the_hubs_error() -> None:
    response: Any = SimpleNamespace(headers={}, request=None)
    section = ModelSection(name_or_path="org/m", revision="v9")
    for cause, words in (
        (errors.GatedRepoError("403 Error", response=response), "is gated"),
        (errors.LocalEntryNotFoundError("not here"), "offline, and 'org/m' is not in the local"),
        (ConnectionError(), "offline"),
        (errors.RepositoryNotFoundError("404", response=response), "no model 'org/m'"),
    ):
        assert words in explain_load_failure(section, cause).what, words
        error = OSError("no v9, says transformers")
        error.__cause__ = cause
        assert words in explain_load_failure(section, error).what, words


def test_an_adapter_on_another_base_is_refused_by_the_name_of_a_layer(tiny_model_dir, runs) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter = runs("lora") / "adapter"
    for change in ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}):
        config = LlamaConfig.from_pretrained(tiny_model_dir, **change)
        with pytest.raises(RecipeError, match="base") as caught:
            attach(LlamaForCausalLM(config), {"default": adapter})
        assert "another base model" in caught.value.hints[0], change


def test_layers_come_from_the_hub_only_where_the_recipe_says_so(tiny_recipe, monkeypatch) -> None:
    """transformers 5.25 takes them by itself, so a recipe would compute other numbers there."""
    asked = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def recorded(path: str, use_kernels: bool | None = None, **options: Any) -> Any:
        asked.append(use_kernels)
        return load(path, **options)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", recorded)
    for words in ([], ["model.use_kernels=false"], ["model.use_kernels=true"]):
        recipe = load_recipe(tiny_recipe, words)
        load_base(recipe, load_tokenizer(recipe))
    assert asked == [False, False, True]


def test_a_base_is_known_by_the_content_of_its_weights(
    tiny_recipe, tiny_model_dir, tmp_path
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    recipe, copy = (
        load_recipe(tiny_recipe, [f"model.name_or_path={place}"])
        for place in (tiny_model_dir, folder)
    )
    assert base_fingerprint(copy) == base_fingerprint(recipe) is not None
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert base_fingerprint(copy) != base_fingerprint(recipe)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_an_adapter_answers_in_the_precision_it_was_trained_in(
    precision, runs, tiny_model_dir
) -> None:
    """PEFT makes each adapter float32, which computes other answers than a bfloat16 one."""
    from transformers import AutoModelForCausalLM

    adapter = runs("lora") / "adapter"
    file = adapter / ADAPTER_WEIGHTS
    weights = {name: tensor.to(precision) for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    model = attach(base, {"default": adapter})
    named = model.named_parameters()
    assert {weight.dtype for name, weight in named if "lora_" in name} == {precision}


@pytest.fixture
def gpu_with(monkeypatch):
    """Give torch's answers a GPU with some free bytes."""

    def give(free: float) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, 2 * free))
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)

    return give


def test_a_model_goes_to_a_gpu_only_if_it_fits_in_the_precision_it_is_turned_into(
    tiny_model_dir, gpu_with
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    gpu_with(1.5 * model.get_memory_footprint())
    assert device_with_room(model).type == "cuda"
    assert device_with_room(model, torch.bfloat16).type == "cuda"
    assert device_with_room(model, torch.float32).type == "cpu"


def test_a_model_that_answers_is_never_sent_to_the_cpu_in_silence(
    tiny_recipe, tiny_model_dir, tiny_tokenizer, gpu_with
) -> None:
    recipe = load_recipe(tiny_recipe, [f"model.name_or_path={tiny_model_dir}"])
    gpu_with(1000)
    for load in (
        lambda: load_base(recipe, tiny_tokenizer),
        lambda: load_saved(tiny_model_dir, recipe, tiny_tokenizer),
    ):
        with pytest.raises(EnvironmentFault, match=r"needs .* GiB of GPU memory; 0\.0 GiB of 0\.0"):
            load()
    merged = load_base(recipe, tiny_tokenizer, merged_in="float32")
    assert merged.device.type == "cpu"  # which takes minutes, and ends


def test_a_4_bit_base_that_is_merged_is_read_where_its_dequantised_weights_fit(
    tiny_recipe, tiny_model_dir, tiny_tokenizer, gpu_with, monkeypatch
) -> None:
    from transformers import AutoModelForCausalLM

    recipe = load_recipe(tiny_recipe, [f"model.name_or_path={tiny_model_dir}", NF4, *HALF])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    devices: list[str] = []

    def load_model(*args, empty=False, device="", **options):
        if not empty:
            devices.append(device)
        return model

    monkeypatch.setattr("recipes_lib.weights.load.load_model", load_model)
    gpu_with(1.5 * model.get_memory_footprint())
    for merged_in in (None, "auto", "float32"):
        load_base(recipe, tiny_tokenizer, merged_in)
    assert devices == ["cuda:0", "cuda:0", "cpu"]
