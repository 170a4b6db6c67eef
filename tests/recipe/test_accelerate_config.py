from __future__ import annotations

import pytest

from recipes_lib.errors import RecipeError
from recipes_lib.recipe.accelerate_config import load_accelerate_config
from recipes_lib.recipe.project import project_root

FSDP = "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_state_dict_type: FULL_STATE_DICT}\n"


@pytest.mark.parametrize("path", sorted((project_root() / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_by_name(path):
    assert load_accelerate_config(path.stem).path == path


def test_a_config_says_what_a_launch_with_it_asks_for():
    config = load_accelerate_config("fsdp_cpu")
    assert (config.distributed_type, config.num_processes, config.use_cpu, config.mixed_precision) == ("FSDP", 2, True, "no")
    assert config.fsdp["fsdp_version"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
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
    ],
)
def test_what_accelerate_would_take_silently_is_refused(text, words, write):
    with pytest.raises(RecipeError, match=words):
        load_accelerate_config(write(text, "acc.yaml"))


def test_a_name_that_does_not_exist_lists_what_does():
    with pytest.raises(RecipeError) as caught:
        load_accelerate_config("dpp")
    assert "did you mean ddp?" in str(caught.value)
    assert "single_gpu" in str(caught.value)


def test_a_recipe_is_no_accelerate_config(write):
    with pytest.raises(RecipeError, match="is a recipe, not an accelerate config"):
        load_accelerate_config(write())
