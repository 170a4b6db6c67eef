from __future__ import annotations

import pytest

from recipes_lib.config.accelerate_config import load_accelerate_config
from recipes_lib.config.loader import load_document
from recipes_lib.config.validation import validate
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.project import project_root

FSDP = (
    "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_state_dict_type:"
    " FULL_STATE_DICT}\n"
)


@pytest.mark.parametrize(
    "path",
    sorted((project_root() / "accelerate_configs").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_every_shipped_config_loads_by_name(path):
    assert load_accelerate_config(path.stem).path == path


def test_a_config_says_what_a_launch_with_it_asks_for():
    config = load_accelerate_config("fsdp_cpu")
    assert (
        config.distributed_type,
        config.num_processes,
        config.use_cpu,
        config.mixed_precision,
    ) == ("FSDP", 2, True, "no")
    assert config.fsdp["fsdp_version"] == 2


# (text, words of the answer)
BAD_CONFIGS = [
    ("distributed_type: NO\n", "quote it"),
    ("distributed_type: MULTI_CPU\n", "use MULTI_GPU with use_cpu"),
    ("distributed_type: DEEPSPEED\n", "not supported"),
    ("distributed_type: FSDPP\n", "did you mean FSDP"),
    ("distributed_type: 'NO'\nmixed_precision: no\n", "quote it"),
    ("distributed_type: 'NO'\nnum_proceses: 2\n", "did you mean num_processes"),
    ("distributed_type: MULTI_GPU\nnum_processes: 0\n", "whole number >= 1"),
    ("distributed_type: MULTI_GPU\nuse_cpu: 1\n", "true or false"),
    (FSDP.replace("fsdp_version: 2", "fsdp_version: 1"), "FSDP1 is deprecated"),
    (FSDP.replace("FULL", "SHARDED"), "writes no adapter"),
    (FSDP.replace("fsdp_version", "fsdp_verson"), "did you mean fsdp_version"),
    ("distributed_type: FSDP\nfsdp_config: 2\n", "must be a mapping"),
    ("distributed_type: 'NO'\nmixed_precision: fp8\n", "fp8 is not supported"),
    (
        "distributed_type: 'NO'\ndeepspeed_config: {zero_stage: 3}\n",
        "deepspeed_config cannot be used",
    ),
    ("distributed_type: 'NO'\nmain_process_port: x\n", "whole number >= 0"),
]


@pytest.mark.parametrize(("text", "words"), BAD_CONFIGS)
def test_what_accelerate_would_take_silently_is_refused(text, words, write):
    with pytest.raises(RecipeError, match=words):
        load_accelerate_config(write(text, "acc.yaml"))


@pytest.mark.parametrize(
    "asked",
    [
        {"distributed_type": "NO", "use_cpu": True, "num_processes": 1},
        {
            "distributed_type": "MULTI_GPU",
            "use_cpu": False,
            "num_processes": 4,
            "num_machines": 2,
            "main_process_port": 29500,
        },
        {
            "distributed_type": "FSDP",
            "use_cpu": False,
            "num_processes": 8,
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_reshard_after_forward": True,
                "fsdp_offload_params": False,
                "fsdp_state_dict_type": "FULL_STATE_DICT",
                "fsdp_cpu_ram_efficient_loading": True,
                "fsdp_activation_checkpointing": False,
            },
        },
    ],
    ids=lambda asked: asked["distributed_type"],
)
def test_what_accelerate_config_writes_is_accepted(asked, tmp_path):
    """Its writer puts keys for TPUs into every file."""
    from accelerate.commands.config.config_args import ClusterConfig

    written = ClusterConfig(
        compute_environment="LOCAL_MACHINE", mixed_precision="no", debug=False, tpu_env=[], **asked
    )
    for file, write in (("acc.yaml", written.to_yaml_file), ("acc.json", written.to_json_file)):
        write(tmp_path / file)
        assert "tpu_use_sudo" in (tmp_path / file).read_text()
        config = load_accelerate_config(tmp_path / file)
        assert (config.distributed_type, config.num_processes) == (
            asked["distributed_type"],
            asked["num_processes"],
        )


def test_accelerates_own_default_config_is_accepted(tmp_path):
    from accelerate.commands.config.default import write_basic_config

    write_basic_config(save_location=str(tmp_path / "default_config.json"))
    assert load_accelerate_config(tmp_path / "default_config.json").distributed_type in (
        "NO",
        "MULTI_GPU",
    )


def test_every_key_of_accelerates_config_is_taken_or_refused_with_a_reason(write):
    """A key that a later accelerate adds must be decided about here."""
    from accelerate.commands.config.config_args import ClusterConfig

    for key in ClusterConfig.__dataclass_fields__:
        text = (
            f"distributed_type: 'NO'\n{key}: {{a: 1}}\n"
            if key != "distributed_type"
            else "distributed_type: 'NO'\n"
        )
        errors = validate(load_document(write(text, "acc.yaml")))
        assert not [error for error in errors if f"unknown key '{key}'" in error.what]


def test_a_name_that_does_not_exist_lists_what_does():
    with pytest.raises(RecipeError) as caught:
        load_accelerate_config("dpp")
    assert "did you mean ddp?" in str(caught.value)
    assert "single_gpu" in str(caught.value)


def test_a_recipe_is_no_accelerate_config(write):
    with pytest.raises(RecipeError, match="is a recipe, not an accelerate config"):
        load_accelerate_config(write())
