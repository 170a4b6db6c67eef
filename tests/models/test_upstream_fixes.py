"""Each way around a bug of a library: the bug is still there, and the fix mends it.

Others are held by trainings: a wrapped head by tests/training/test_train.py, sums in float32 and
empty parameters by tests/invariants.
"""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from tests.families import build_family, family_config
from transformers import AutoModelForCausalLM, PreTrainedConfig, configuration_utils

from recipes_lib.models import upstream_fixes


def test_an_adapter_that_peft_loads_as_float32_gets_its_precision_back(
    tiny_model_dir, tmp_path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    model = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False
    )
    before = {
        name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad
    }
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    loaded = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    assert loaded == {torch.float32}, "PEFT keeps the precision now: restore_precision can go"
    upstream_fixes.restore_precision(model, before)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {
        torch.bfloat16
    }


def test_all_weights_of_a_model_with_experts_are_loaded(tiny_model_dir, tmp_path) -> None:
    folder = build_family("qwen3_moe", tmp_path / "moe", tiny_model_dir)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    other = AutoModelForCausalLM.from_config(saved.config)
    upstream_fixes.load_whole(other, folder)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_model_that_the_trainer_could_load_by_names_is_not_read_a_second_time(
    tiny_model_dir, tmp_path, monkeypatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tied = AutoModelForCausalLM.from_config(model.config)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("read again")

    folder = build_family("qwen3_moe", tmp_path / "moe", tiny_model_dir)
    experts = AutoModelForCausalLM.from_pretrained(folder)
    for each in (model, experts):
        monkeypatch.setattr(type(each), "from_pretrained", read)
    upstream_fixes.load_whole(model, tiny_model_dir)
    upstream_fixes.load_whole(tied, tmp_path / "tied")
    with pytest.raises(AssertionError, match="read again"):
        upstream_fixes.load_whole(experts, folder)


def test_parameters_without_memory_have_addresses_of_their_own() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert len({weight.data_ptr() for weight in model.parameters()}) == 1
    upstream_fixes.tell_empty_parameters_apart(model)
    assert len({weight.data_ptr() for weight in model.parameters()}) == 4


def test_the_trainer_reads_the_checkpoint_of_a_model_with_kinds_of_layers_of_its_own(
    tmp_path, monkeypatch
) -> None:
    allowed = configuration_utils.ALLOWED_MLP_LAYER_TYPES
    monkeypatch.setattr(configuration_utils, "ALLOWED_MLP_LAYER_TYPES", allowed)
    config = family_config("deepseek_v4")
    config.save_pretrained(tmp_path)

    def read() -> PreTrainedConfig:  # as Trainer._load_from_checkpoint does
        return PreTrainedConfig.from_json_file(tmp_path / "config.json")

    with pytest.raises(StrictDataclassClassValidationError, match="hash_moe"):
        read()
    upstream_fixes.let_checkpoints_name_layers(config)
    assert read().mlp_layer_types == ["hash_moe", "moe"]
