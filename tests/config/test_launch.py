"""Accelerate configs, how many processes on how many machines, and the plain command for them."""

import shlex

import pytest

from recipes_lib.config.launch import (
    LaunchSection,
    load_accelerate_config,
    place_machine,
    plan_launch,
)
from recipes_lib.core.errors import RecipeError, RecipeErrors

SHARDS = "{fsdp_version: 2, fsdp_state_dict_type: FULL_STATE_DICT}"
FSDP = f"distributed_type: FSDP\nfsdp_config: {SHARDS}\n"
# (text, words of the answer)
BAD_CONFIGS = [
    ("distributed_type: DEEPSPEED\n", "distributed_type: Input should be"),
    ("distributed_type: MULTI_GPU\nnum_processes: 0\n", "num_processes: Input should be"),
    ("distributed_type: MULTI_GPU\nnum_procesess: 2\n", "without num_processes starts 1"),
    (FSDP.replace("fsdp_version: 2", "fsdp_version: 1"), "FSDP1 is deprecated"),
    (FSDP.replace("FULL", "SHARDED"), "writes no adapter"),
    (FSDP.replace("fsdp_version", "fsdp_verson"), "did you mean fsdp_config.fsdp_version"),
    ("distributed_type: FSDP\nfsdp_config: 2\n", "dictionary"),
    ("distributed_type: 'NO'\nmixed_precision: fp8\n", "mixed_precision: Input should be"),
    ("distributed_type: 'NO'\ndeepspeed_config: {zero_stage: 3}\n", "cannot be used here"),
    ("model: {name_or_path: a}\n", "of kind accelerate, found recipe"),
]


def test_unknown_keys_on_one_line_are_named_in_one_order(write):
    """Not in that of a set of texts, which is another in each process."""
    keys = ["zebra", "yak", "xerus", "wolf", "viper", "urial"]
    values = ", ".join([SHARDS.strip("{}"), *(f"{key}: 1" for key in keys)])
    with pytest.raises(RecipeErrors) as refused:
        load_accelerate_config(
            write(f"distributed_type: FSDP\nfsdp_config: {{{values}}}\n", "acc.yaml")
        )
    unknown = [error.what for error in refused.value.errors if "unknown" in error.what]
    assert unknown == [f"unknown key 'fsdp_config.{key}'" for key in sorted(keys)]


@pytest.mark.parametrize(("text", "words"), BAD_CONFIGS)
def test_what_accelerate_would_take_silently_is_refused(text, words, write):
    with pytest.raises(RecipeError) as refused:
        load_accelerate_config(write(text, "acc.yaml"))
    assert words in str(refused.value)


def test_what_accelerate_config_writes_is_accepted(tmp_path):
    """Its writer puts keys for TPUs into every file."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.config.default import write_basic_config

    sharded = {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}
    for asked in (
        {"distributed_type": "NO", "use_cpu": True},
        {"distributed_type": "MULTI_GPU", "use_cpu": False},
        {"distributed_type": "FSDP", "use_cpu": False, "fsdp_config": sharded},
    ):
        shared = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "debug": False}
        written = ClusterConfig(tpu_env=[], num_processes=4, **shared, **asked)
        for file, save in (("a.yaml", written.to_yaml_file), ("a.json", written.to_json_file)):
            save(tmp_path / file)
            config = load_accelerate_config(tmp_path / file)
            assert config.distributed_type == asked["distributed_type"]
    write_basic_config(save_location=str(tmp_path / "default_config.json"))
    load_accelerate_config(tmp_path / "default_config.json")


# (launch section, flags) -> processes, machines
LAUNCHES = [
    ({"accelerate": "single_gpu"}, {}, 1, 1),
    ({"accelerate": "fsdp_multi_node"}, {}, 16, 2),
    ({"accelerate": "fsdp_multi_node"}, {"nodes": 1}, 8, 1),
    ({"accelerate": "fsdp", "gpus": 8, "nodes": 2}, {"gpus": 4}, 8, 2),
    ({"accelerate": "fsdp", "gpus": 8, "nodes": 2}, {"accelerate": "ddp"}, 2, 1),
]


def test_flags_win_over_the_recipe_and_the_recipe_over_the_config():
    for section, flags, processes, machines in LAUNCHES:
        launch = plan_launch(LaunchSection(**section), **flags)
        assert (launch.world_size, launch.machines) == (processes, machines), (section, flags)


def test_the_launcher_is_told_what_its_config_does_not_say():
    launch = plan_launch(LaunchSection(accelerate="fsdp", gpus=8, nodes=2))
    assert place_machine(launch, 1, "node0", None).launcher_words()[2:] == shlex.split(
        "--num_processes 16 --num_machines 2 --same_network --machine_rank 1 --main_process_ip"
        " node0 --main_process_port 29500"
    )
    assert plan_launch(LaunchSection(accelerate="ddp")).launcher_words()[2:] == []


def test_several_machines_need_a_rank_and_an_address():
    several, single = LaunchSection(accelerate="fsdp_multi_node"), LaunchSection()
    for section, place, words in (
        (several, (None, None, None), "--machine-rank N"),
        (several, (1, None, None), "--main-process-ip HOST"),
        (several, (2, "node0", None), "0 to 1"),
        (single, (0, None, None), "need --nodes"),
    ):
        with pytest.raises(RecipeError, match=words):
            place_machine(plan_launch(section), *place)
    with pytest.raises(RecipeError, match="starts one process"):
        plan_launch(single, gpus=4)


def test_the_next_line_of_a_dry_run_is_the_command_without_it(said):
    flags = ["--accelerate", "ddp", "--gpus", "4", "--resume-anyway"]
    override = "train.eval_strategy='no'"
    printed = said("train", "llama2-7b-dolly/qlora-r8", override, *flags, "--dry-run")
    command, following = printed.splitlines()
    assert shlex.split(following)[4] == override  # quotes survive pasting
    assert shlex.split(command)[-2:] == [override, "--resume-anyway"]


def test_a_config_of_another_precision_is_refused(tmp_path, tiny_recipe_text, said):
    foreign, recipe = tmp_path / "foreign.yaml", tmp_path / "tiny.yaml"
    text = tiny_recipe_text(tmp_path)
    for precision in ("bf16", "fp16"):
        foreign.write_text(f"distributed_type: 'NO'\nuse_cpu: true\nmixed_precision: {precision}\n")
        recipe.write_text(text.replace("{accelerate: cpu}", f"{{accelerate: {foreign}}}"))
        refused = f"asks for mixed_precision {precision}, but the recipe for no"
        assert refused in said("check", recipe, code=2)
        # the training refuses it too: one process hears of it without accelerate launch
        recipe.write_text(text)
        command = said("train", recipe, "--accelerate", foreign, "--dry-run")
        assert f"env ACCELERATE_MIXED_PRECISION={precision} ACCELERATE_USE_CPU=true " in command
