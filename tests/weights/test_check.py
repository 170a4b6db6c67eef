"""The bytes on the disk are the bytes that were trained: what is proven after a training, and what
the proof finds.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from recipes_lib.core.errors import RecipesError
from recipes_lib.weights.proof import check_saved, same_bytes
from recipes_lib.weights.runs import changed_files, recorded_hashes

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 5]},
}


def trained_adapter(model_dir: Path, folder: Path, **settings: Any) -> Any:
    """Save an adapter with random values into a folder, and return its model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def test_every_kind_of_adapter_is_proven_and_hashed(tiny_model_dir, tmp_path) -> None:
    for name, settings in ADAPTERS.items():
        folder = tmp_path / name
        model = trained_adapter(tiny_model_dir, folder, **settings)
        saved = check_saved(model, folder, base=str(tiny_model_dir))
        assert saved["tensors"] >= 8 and saved["sha256"] == recorded_hashes(folder), name


def test_a_damaged_adapter_is_refused_with_the_name_of_the_tensor(tiny_model_dir, tmp_path) -> None:
    import torch

    def flip_one_bit(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values())).view(torch.uint8)[0, 0] ^= 1

    def rename(tensors: dict[str, Any]) -> None:
        name, tensor = tensors.popitem()
        tensors[name.replace("layers.1", "layers.7")] = tensor

    def round_to_half(tensors: dict[str, Any]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    for change in (flip_one_bit, dict.popitem, rename, round_to_half):
        folder = tmp_path / change.__name__
        model = trained_adapter(tiny_model_dir, folder)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(RecipesError, match=r"layers\.") as caught:
            check_saved(model, folder, base=str(tiny_model_dir))
        assert "not the trained ones" in caught.value.what, change.__name__


def test_an_adapter_that_changes_nothing_is_not_finite_or_of_another_base_is_refused(
    tiny_model_dir, tmp_path
) -> None:
    for value, base, word in (
        (0.0, str(tiny_model_dir), "changes nothing"),
        (float("nan"), str(tiny_model_dir), "not finite"),
        (1.0, "other/base", "names the base"),
    ):
        folder = tmp_path / word
        model = trained_adapter(tiny_model_dir, folder)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(value)
        model.save_pretrained(folder)
        with pytest.raises(RecipesError, match=word):
            check_saved(model, folder, base=base)


def test_a_whole_model_with_tied_embeddings_and_one_of_experts_are_proven(tmp_path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    models = {
        "tied": LlamaForCausalLM(LlamaConfig(**small, **heads, tie_word_embeddings=True)),
        "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**small, **heads, **experts)),
    }
    for name, model in models.items():
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size="20KB" if name == "tied" else "5GB")
        assert check_saved(model, folder, base="")["tensors"] > 10
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[0] += 1e-6
        with pytest.raises(RecipesError, match=r"layers\.1\.input_layernorm"):
            check_saved(model, folder, base="")


def test_same_bytes_tells_dtypes_and_signs_of_zero_apart() -> None:
    import torch

    zero, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert same_bytes(nan, nan.clone()) and same_bytes(zero, zero.clone())
    assert not same_bytes(zero, -zero) and not same_bytes(zero, zero.bfloat16())


def test_a_base_may_be_moved_but_no_other_file_may_change(tiny_model_dir, tmp_path) -> None:
    trained_adapter(tiny_model_dir, tmp_path)
    recorded = recorded_hashes(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": "moved"}))
    assert not changed_files(tmp_path, recorded)
    file.write_text(json.dumps({**settings, "lora_alpha": 999}))
    assert changed_files(tmp_path, recorded) == ["adapter_config.json"]
